"""How this node is, by the rules that the cluster uses: for `NodeEngine status` and `NodeEngine doctor`."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flops import __version__
from flops.adapters.host_facts import LocalHost
from flops.adapters.node_identity import read_identity
from flops.adapters.node_link import dial_cluster
from flops.adapters.system_clock import SystemClock
from flops.cli.examination import (
    HERE,
    WAIT_S,
    Check,
    examine_certificate,
    examine_disk,
    is_answering,
    skew_against,
)
from flops.cli.node_config import load_configuration
from flops.cli.node_process import running_report
from flops.core.build_tools import build_findings
from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON
from flops.core.health import (
    REPORT_STALE_AFTER_S,
    Finding,
    Severity,
    addon_findings,
    clock_findings,
    fine,
    known,
    limit_findings,
    load_findings,
    problem,
    service_findings,
    version_findings,
)
from flops.node.home import running_pid
from flops.wire.flight import ENDPOINT_FILE, IDENTITY_FILE
from flops.wiring.membership import Membership
from flops.wiring.node_files import node_build_tools, node_engine_findings

if TYPE_CHECKING:
    from flops.node.configuration import NodeConfiguration
    from flops.node.paths import NodePaths
    from flops.node.report import NodeReport


def node_findings(
    paths: NodePaths, conf: NodeConfiguration, report: NodeReport | None, pid: int | None
) -> Iterator[Finding]:
    """What is wrong with this node, by its daemon's report and a look at the machine."""
    if pid is None:
        was_killed = " It was killed, or has crashed." if paths.status.exists() else ""
        what = f"NodeEngine is not running.{was_killed}"
        yield problem("daemon", str(paths.home), what, f"`NodeEngine -d` starts it; its log is {paths.log}.")
        return
    if report is None:
        what = f"NodeEngine (process {pid}) tells nothing about itself."
        yield problem(
            "daemon", str(paths.home), what, f"It is starting, or cannot write: look at {paths.log}."
        )
        return
    age_s = SystemClock().now_s() - report.written_at_s
    if age_s > REPORT_STALE_AFTER_S:
        what = f"NodeEngine (process {pid}) has told nothing for {age_s:.0f} s: this is what it was then."
        yield problem(
            "daemon", report.name, what, "It stands still, or cannot write: `NodeEngine stop`, then -d."
        )
    if not report.is_connected:
        what = f"It is not connected to {report.cluster_address}: {report.link_detail}"
        yield problem("connection", report.name, what, "Look whether the cluster runs there: `flops status`.")
    host = LocalHost(paths.home, conf.cluster_address, __version__, is_public=conf.is_public)
    yield from addon_findings(report.addons, report.name)
    yield from load_findings(host.load(), report.name)
    yield from service_findings([line.status for line in report.services], report.name)
    yield from version_findings(report.version, __version__, report.name)
    yield from limit_findings(report.limits, report.limits_note, report.name)
    if report.prefers_containers:
        engine = node_engine_findings(is_preferred=True)
        yield from (finding for finding in engine if finding.severity.rank >= Severity.WARNING.rank)


def node_checks(paths: NodePaths) -> dict[str, Check]:
    """Everything that `NodeEngine doctor` looks at."""
    return {
        "configuration": functools.partial(_examine_configuration, paths),
        "daemon": functools.partial(_examine_daemon, paths),
        "cluster": functools.partial(_examine_cluster, paths),
        "certificate": functools.partial(_examine_certificates, paths),
        "data server": functools.partial(_examine_data_server, paths),
        "tools": functools.partial(_examine_tools, paths),
        "containers": functools.partial(_examine_containers, paths),
        "disk": functools.partial(examine_disk, paths.home),
    }


def _examine_configuration(paths: NodePaths) -> Iterator[Finding]:
    conf = load_configuration(paths)
    addons = ", ".join(conf.active_addons) or "none"
    yield fine("configuration", str(paths.conf), f"It is valid. Cluster: {conf.cluster}; addons: {addons}.")
    yield fine("versions", HERE, f"FLOps {__version__}, Python {platform.python_version()}.")


def _examine_daemon(paths: NodePaths) -> Iterator[Finding]:
    report = running_report(paths)
    found = list(node_findings(paths, load_configuration(paths), report, running_pid(paths.pid)))
    if report is not None and not any(finding.check in {"daemon", "connection"} for finding in found):
        yield fine("daemon", report.name, f"It runs (process {report.pid}) and is connected.")
    # What follows has checks of its own.
    yield from (finding for finding in found if finding.check not in {"disk", "containers"})


def _examine_cluster(paths: NodePaths) -> Iterator[Finding]:
    conf = load_configuration(paths)
    tls = Membership(paths, conf, SystemClock()).tls
    dial_cluster(conf.cluster, tls=tls, timeout_s=WAIT_S).close()
    yield fine("cluster", conf.cluster, "It can be reached, and takes nodes.")
    if tls is None:
        yield known("encryption", conf.cluster, "The connection to the cluster is not encrypted.")
        skew_s = skew_against(f"http://{conf.cluster}")
        if skew_s is not None:
            found = list(clock_findings(skew_s, HERE, "the cluster's"))
            yield from found or [fine("clock", HERE, "Its clock is that of the cluster, to a second.")]


def _examine_certificates(paths: NodePaths) -> Iterator[Finding]:
    """The node's own certificate, and its data server's; nothing where it has none."""
    for file in (paths.identity, paths.data_server / IDENTITY_FILE):
        if file.exists() and (found := read_identity(file)) is not None:
            yield from examine_certificate(found.not_before_s, found.not_after_s, str(file))


def _examine_data_server(paths: NodePaths) -> Iterator[Finding]:
    if LEARNER_ADDON not in load_configuration(paths).active_addons:
        yield known("data server", HERE, f"The addon {LEARNER_ADDON} is off: this node holds no data.")
        return
    advice = "While NodeEngine runs, it is started again by itself; `NodeEngine logs` says more."
    try:
        endpoint = json.loads((paths.data_server / ENDPOINT_FILE).read_text())
        host, port = str(endpoint["host"]), int(endpoint["port"])
        is_there = is_answering(host, port)
    except (OSError, ValueError, KeyError, TypeError):
        yield problem("data server", HERE, "The ML data server is not ready.", advice)
        return
    if is_there:
        yield fine("data server", f"{host}:{port}", "It listens.")
    else:
        yield problem("data server", f"{host}:{port}", "The ML data server does not listen.", advice)


def _examine_tools(paths: NodePaths) -> Iterator[Finding]:
    from flops.cli.doctor_machine import examine_tools

    is_builder = IMAGE_BUILDER_ADDON in load_configuration(paths).active_addons
    yield from examine_tools(is_builder)
    if is_builder:
        yield from build_findings(node_build_tools())


def _examine_containers(paths: NodePaths) -> Iterator[Finding]:
    yield from node_engine_findings(is_preferred=load_configuration(paths).prefers_containers)
