"""The systemd unit of the machine's own node."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flops.cli.node_process import UNIT, UNIT_FILE, unit_text
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.node.paths import NodePaths


def install_unit(paths: NodePaths, target: Path | None) -> str:
    """Write the unit, and have systemd load it where it runs.

    Args:
        paths: the machine's own node.
        target: another place for the unit; then nothing is loaded.

    Returns:
        What was done, for people.

    Raises:
        FlopsError: ``usage`` for another node than the machine's own, ``forbidden`` without root,
            ``config_invalid`` when systemd does not accept the unit, ``file_unreadable``, ``disk_full``.
    """
    if not paths.is_system and target is None:
        raise FlopsError(
            ErrorCode.USAGE if os.geteuid() == 0 else ErrorCode.FORBIDDEN,
            f"systemd runs the machine's own node only, not the one in {paths.home}.",
            hint="Use sudo, and neither --home nor FLOPS_HOME; or --unit FILE to only write the unit.",
        )
    text = unit_text(paths)
    _verify(text)
    paths.log.parent.mkdir(parents=True, exist_ok=True)
    write_durably(target or UNIT_FILE, text, mode=0o644)
    if target is not None:
        return f"The unit is written to {target}."
    if not Path("/run/systemd/system").is_dir():
        return f"The unit is written to {UNIT_FILE}; systemd does not run here, so it is not loaded."
    subprocess.run(["systemctl", "daemon-reload"], check=False)
    return f"{UNIT} is installed: `systemctl enable --now {UNIT}` starts it now and at every boot."


def _verify(text: str) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / UNIT
        file.write_text(text)
        result = subprocess.run([tool, "verify", str(file)], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"systemd does not accept the unit: {(result.stderr or result.stdout).strip()[:500]}",
            hint="Nothing was installed.",
        )
