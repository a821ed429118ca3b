"""FLOps: federated learning operations."""

__version__ = "0.1.0"
