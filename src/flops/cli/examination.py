"""Running checks side by side, none of which can hang or break the others, and showing what they found."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import typer

from flops.adapters.system_clock import SystemClock
from flops.cli.findings import show_findings
from flops.cli.output import OutputFormat, print_data, say, timestamp
from flops.core.address import split_port
from flops.core.health import (
    Finding,
    Severity,
    certificate_findings,
    disk_findings,
    fine,
    health_of,
    problem,
)
from flops.errors import CATALOGUE, ErrorCode, FlopsError

Check = Callable[[], Iterable[Finding]]

LIMIT_S = 3.0  # for a check; what it waits for inside has to end a little sooner
WAIT_S = 2.5
HERE = "this machine"


def run_checks(checks: Mapping[str, Check], *, limit_s: float = LIMIT_S) -> list[Finding]:
    """Run checks side by side; what they find, in their order.

    A check that has no answer in time, raises, or has a defect, is a problem of its own.
    """
    answers: dict[str, Sequence[Finding]] = {}

    def run(name: str, check: Check) -> None:
        try:
            answers[name] = tuple(check())
        except FlopsError as error:
            answers[name] = [problem(name, HERE, error.message, error.hint)]
        except Exception as exc:  # noqa: BLE001 (a defect of one check hides no other one's findings)
            what = f"The check ended by {type(exc).__name__}: {exc}."
            answers[name] = [problem(name, HERE, what, "This is a defect of FLOps. Please report it.")]

    threads = [threading.Thread(target=run, args=item, name=item[0], daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    late = f"There was no answer within {limit_s:g} s."
    advice = "Look whether this machine is overloaded, or a disk or the network does not answer."
    return [finding for name in checks for finding in answers.get(name, [problem(name, HERE, late, advice)])]


def tell_findings(findings: Sequence[Finding], output_format: OutputFormat) -> None:
    """Print what was found, worst first; exit with ``unhealthy`` when there is a problem."""
    health = health_of(findings)
    print_data(health, output_format, lambda: show_findings(health.findings))
    problems = sum(f.severity is Severity.PROBLEM for f in findings)
    warnings = sum(f.severity is Severity.WARNING for f in findings)
    say(f"{_count(problems, 'problem')}, {_count(warnings, 'warning')}, {len(findings)} findings in all.")
    if problems:
        raise typer.Exit(CATALOGUE[ErrorCode.UNHEALTHY].exit_code)


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def examine_disk(folder: Path) -> Iterable[Finding]:
    """The disk that a folder is on, or will be on."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(existing)
    free_mb, total_mb = usage.free // 1024**2, usage.total // 1024**2
    found = list(disk_findings(free_mb, total_mb, str(folder)))
    return found or [fine("disk", str(folder), f"{free_mb:,} of {total_mb:,} MB are free.")]


def examine_certificate(not_before_s: float, not_after_s: float, where: str) -> Iterable[Finding]:
    """Until when a certificate is good; see `certificate_findings`."""
    found = list(certificate_findings(not_before_s, not_after_s, SystemClock().now_s(), where))
    return found or [fine("certificate", where, f"It is good until {timestamp(not_after_s)}.")]


def examine_shown_certificate(address: str) -> Iterable[Finding]:
    """The certificate that is shown at an address, ``host:port``, whoever is there."""
    from flops.adapters.certificates import life_of

    try:
        shown = ssl.get_server_certificate(split_port(address), timeout=WAIT_S)
        return examine_certificate(*life_of(shown), address)
    except (OSError, ValueError) as exc:
        what = f"No certificate can be seen: {exc}."
        return [problem("certificate", address, what, "Look at the log of the control plane.")]


def is_answering(host: str, port: int) -> bool:
    """Whether the machine of an address answers: by a connection, or by refusing one.

    Raises:
        OSError: why it does not.
    """
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=WAIT_S):
            return True
    except ConnectionRefusedError:
        return False


def skew_against(url: str, tls: ssl.SSLContext | None = None) -> float | None:
    """How far this machine's clock is ahead of a server's, in seconds; None when the server tells none.

    A server tells whole seconds: less than a second is no skew.

    Args:
        url: of the server.
        tls: how to encrypt, if not as for any web server.

    Raises:
        FlopsError: ``unreachable``.
    """
    try:
        answer = httpx.get(url, timeout=WAIT_S, trust_env=False, verify=tls if tls is not None else True)
    except httpx.HTTPError as exc:
        raise FlopsError(ErrorCode.UNREACHABLE, f"{url} does not answer: {exc}.") from exc
    try:
        theirs_s = parsedate_to_datetime(answer.headers["date"]).timestamp()
    except (KeyError, ValueError):
        return None
    skew_s = SystemClock().now_s() - theirs_s - 0.5
    return 0.0 if abs(skew_s) < 1.0 else skew_s
