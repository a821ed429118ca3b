"""Which node runs what of a project, decided from facts alone; and why it is impossible, node by node."""

from __future__ import annotations
