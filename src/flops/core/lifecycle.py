"""The life of a project as a pure state machine: events in, a changed project, history and effects out."""

from __future__ import annotations
