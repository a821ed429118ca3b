"""Where things are in an image of FLOps: builders put them there, nodes start services by it."""

from __future__ import annotations

PROJECT = "/opt/project"  # the project's environment
MODEL = "/opt/model"  # the environment that saves and serves models: the project's pins, and MLflow
OWN = "/opt/flops"  # what our own modules import
OWN_MODULES = "/app/flops"
KIT = "/app/kit"  # our modules for the project's environments
BUNDLE = "/app/bundle"  # the ML repository, or the trained model


def python_of(environment: str) -> str:
    """The interpreter of an environment in an image."""
    return f"{environment}/bin/python"
