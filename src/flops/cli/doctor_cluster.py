"""What `flops doctor` asks the manager, and checks of nodes from where it runs."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import flops
from flops.adapters.system_clock import SystemClock
from flops.cli.api_client import ApiClient
from flops.cli.connection import find_manager, is_elsewhere
from flops.cli.control import LOG_FILE, read_endpoint
from flops.cli.examination import HERE, WAIT_S, Check, examine_shown_certificate, is_answering, skew_against
from flops.control.lifetime import ENDPOINT_FILE, STARTUP_ERROR_FILE
from flops.core.federation import cluster_findings
from flops.core.health import clock_findings, fine, is_loopback, known, problem, version_findings, warning
from flops.errors import FlopsError
from flops.wire.cluster_tls import manager_tls
from flops.wire.rest import ClusterList, ControlStatus, NodeList

if TYPE_CHECKING:
    from flops.core.federation import ClusterSummary
    from flops.core.health import ExaminedNode, Finding
    from flops.settings import ClientSettings

_MLFLOW_STARTS_WITHIN_S = 90.0
_UNUSED_PORT = 9  # discard: an address without a known port is asked there, and refuses when it is reached


@dataclass
class Asked:
    """What the manager has answered; None what it has not."""

    status: ControlStatus | None = None
    nodes: tuple[ExaminedNode, ...] | None = None
    clusters: tuple[ClusterSummary, ...] = ()


def examine_manager(settings: ClientSettings, asked: Asked) -> Iterator[Finding]:
    """Whether the control plane runs and answers; keeps its answers."""
    is_local = not is_elsewhere(settings)
    if is_local and read_endpoint(settings.control_dir) is None:
        yield _not_running(settings.control_dir)
        return
    manager = find_manager(settings)
    url = manager.url
    client = ApiClient(url, manager.token, authority=manager.authority, silence_s=WAIT_S)
    try:
        asked.status = client.get("/status", ControlStatus)
        asked.nodes = client.get("/nodes", NodeList).nodes
        asked.clusters = client.get("/clusters", ClusterList).clusters
    except FlopsError as error:
        advice = error.hint
        if is_local:
            log = settings.control_dir / LOG_FILE
            advice = f"Its process runs: look at {log}, then `flops down` and `flops up`."
        yield problem("control plane", url, error.message, advice)
        return
    finally:
        client.close()
    yield fine("control plane", url, f"It answers, and runs FLOps {asked.status.version}.")
    skew_s = skew_against(url, manager_tls(manager.authority) if manager.authority else None)
    if skew_s is not None:
        found = list(clock_findings(skew_s, HERE, "the control plane's"))
        yield from found or [fine("clock", HERE, "Its clock is that of the control plane, to a second.")]
    yield from version_findings(flops.__version__, asked.status.version, HERE)


def _not_running(control: Path) -> Finding:
    what = f"No control plane runs with its state in {control}."
    if (control / ENDPOINT_FILE).exists():
        what = f"The control plane with its state in {control} was killed, or has crashed."
    try:
        error = FlopsError.from_dict(json.loads((control / STARTUP_ERROR_FILE).read_text()))
        what = f"{what} Its last start failed: {error.message}"
    except (OSError, ValueError, AttributeError):
        pass
    return problem("control plane", HERE, what, f"Start it with `flops up`; its log is {control / LOG_FILE}.")


def checks_of_cluster(asked: Asked, *, is_local: bool) -> dict[str, Check]:
    """The checks that the manager's answers allow; `is_local` on the control plane's own machine."""
    if asked.status is None or asked.nodes is None:
        return {}
    checks: dict[str, Check] = {
        "MLflow": functools.partial(_examine_tracking, asked.status),
        "certificate": functools.partial(_examine_certificates, asked.status),
        "encryption": functools.partial(_examine_encryption, asked.status, asked.nodes),
        "clusters": functools.partial(
            cluster_findings, asked.clusters, SystemClock().now_s(), asked.status.version
        ),
        "nodes": functools.partial(_examine_nodes, asked.nodes),
    }
    for node in asked.nodes:
        if node.is_connected:
            checks[f"address of {node.name} ({node.id})"] = functools.partial(
                _examine_address, node, is_local=is_local
            )
    return checks


def _examine_tracking(status: ControlStatus) -> Iterator[Finding]:
    url = status.tracking_url
    if status.is_tracking_ready:
        yield fine("MLflow", url, "It is ready.")
    elif SystemClock().now_s() - status.started_at_s < _MLFLOW_STARTS_WITHIN_S:
        yield warning("MLflow", url, "It is starting.", "Wait: it needs some seconds.")
    else:
        what = f"It does not answer: {status.tracking_detail}."
        yield problem("MLflow", url, what, "It is started again by itself; its log says why it ends.")


def _examine_certificates(status: ControlStatus) -> Iterator[Finding]:
    """The certificates that the manager and the cluster show right now."""
    manager = urlsplit(status.manager_url)
    if manager.scheme == "https":
        yield from examine_shown_certificate(status.manager_url.partition("://")[2])
    if status.is_cluster_encrypted:
        yield from examine_shown_certificate(status.cluster_address)


def _examine_encryption(status: ControlStatus, nodes: tuple[ExaminedNode, ...]) -> Iterator[Finding]:
    listening = {
        **({} if status.manager_url.startswith("https:") else {"the manager": status.manager_host}),
        **({} if status.is_cluster_encrypted else {"the cluster": status.cluster_address.rpartition(":")[0]}),
    }
    if not status.is_cluster_encrypted:  # then neither do data servers
        listening |= {f"node {node.name}": node.facts.address for node in nodes if node.is_connected}
    open_ones = [f"{name} ({host})" for name, host in listening.items() if not is_loopback(host)]
    if open_ones:
        what = f"Others on the network can reach, without encryption: {', '.join(open_ones)}."
        yield warning(
            "encryption", HERE, what, "Use a network that you trust, such as a VPN or a closed subnet."
        )
    else:
        what = "What others on the network reach is encrypted, but for models that are served."
        yield known("encryption", HERE, what)


def _examine_nodes(nodes: tuple[ExaminedNode, ...]) -> Iterator[Finding]:
    if not nodes:
        yield warning(
            "nodes", HERE, "No node has joined yet.", "`NodeEngine -a ADDRESS -d` makes a machine one."
        )
    for node in nodes:
        if not node.health.reason:
            yield fine("nodes", node.name, "It is connected and healthy.")
        yield from node.health.findings


def _examine_address(node: ExaminedNode, *, is_local: bool) -> Iterator[Finding]:
    """Whether the address at which a node's data server and services are announced can be reached."""
    host = node.facts.address
    if not is_local and is_loopback(host):
        yield known("address", node.name, f"It is announced at {host}, which cannot be checked from here.")
        return
    port = next((addon.port for addon in node.addons if addon.port), 0)
    where = f"{host}:{port}" if port else host
    make = problem if is_local else warning  # a client does not have to reach nodes; their peers have to
    try:
        has_listener = is_answering(host, port or _UNUSED_PORT)
    except OSError as exc:
        what = f"It cannot be reached at {where}: {exc.strerror or 'no answer'}."
        advice = "Open the firewall, or have it announce another address: `NodeEngine config visibility`."
        yield make("address", node.name, what, advice)
        return
    if not port:
        yield fine("address", node.name, f"It can be reached at {where}.")
    elif has_listener:
        yield fine("data server", node.name, f"It can be reached at {where}.")
    else:
        what = f"Its data server does not listen at {where}."
        advice = "Its node starts it again by itself; `NodeEngine status` there says how it is."
        yield make("data server", node.name, what, advice)
