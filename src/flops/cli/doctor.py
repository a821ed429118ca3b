"""``flops doctor``: what is wrong with the control plane, this machine and the nodes, and what to do."""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Annotated

import typer

import flops
from flops.cli.connection import client_settings, is_elsewhere
from flops.cli.output import FormatOption, OutputFormat


def doctor(
    home: Annotated[Path | None, typer.Option("--home", help="Folder of all state [FLOPS_HOME].")] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Check the control plane, its machine and the nodes, and say what to do about each finding."""
    from flops.cli import doctor_machine as machine
    from flops.cli.doctor_cluster import Asked, checks_of_cluster, examine_manager
    from flops.cli.examination import HERE, Check, examine_disk, run_checks, tell_findings
    from flops.core.health import fine
    from flops.settings import ControlSettings

    settings = client_settings(home)
    control = settings.control_dir
    is_local = not is_elsewhere(settings)
    asked = Asked()
    checks: dict[str, Check] = {
        "control plane": functools.partial(examine_manager, settings, asked),
        "tools": functools.partial(machine.examine_tools, is_local),
        "versions": lambda: [
            fine("versions", HERE, f"FLOps {flops.__version__}, Python {platform.python_version()}.")
        ],
    }
    if is_local:
        checks |= {
            "home": functools.partial(machine.examine_home, control),
            "ports": lambda: machine.examine_ports(control, ControlSettings.read(home=settings.home)),
            "disk": functools.partial(examine_disk, settings.home),
            "databases": functools.partial(machine.examine_databases, control),
            "clock": functools.partial(machine.examine_clock, control),
        }
    findings = run_checks(checks)
    findings += run_checks(checks_of_cluster(asked, is_local=is_local))
    tell_findings(findings, output_format)
