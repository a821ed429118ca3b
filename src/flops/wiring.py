"""The one place that knows both processes and adapters, and joins them. The only module that reads settings.

Imports stand inside the functions, so that `flops --help` and `NodeEngine config addon` load nothing they do
not need.
"""

from __future__ import annotations
