"""Services of a real node whose program a test gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flops.core.cluster import ServiceSpec
from flops.core.reach import Reach
from flops.node.preparation import Launch, NodeSite, Preparer, Report
from flops.node.service_folder import ServiceFolder


class GivenProgram(Preparer):
    """Has services run the Python ``program`` of their configuration."""

    def __init__(self) -> None:  # nothing has to be fetched or built
        self.site = NodeSite("n", "127.0.0.1", "", Path(), Path(), Path(), {})

    def prepare(self, spec: ServiceSpec, folder: ServiceFolder, report: Report) -> Launch:
        """What starts the program."""
        argv = (sys.executable, "-I", "-c", str(spec.config["program"]))
        return Launch(argv, {"PATH": os.defpath}, folder.work_dir, Reach())
