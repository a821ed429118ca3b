"""The NodeEngine daemon: holds the node's parts together from start to stop."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from flops.core.cluster import HEARTBEAT_INTERVAL_S
from flops.disclosure import Disclosure
from flops.durable_file import write_durably
from flops.errors import FlopsError
from flops.node.addons import Addons
from flops.node.agent import LinkState, NodeAgent
from flops.node.caches import NodeCaches
from flops.node.report import NodeReport, ServiceLine
from flops.node.supervisor import Supervisor
from flops.ports import Clock, Runtime

_AGENT_STOP_TIMEOUT_S = 20.0
_REPORT_CHECK_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DaemonFacts:
    """What does not change while a daemon runs.

    Args:
        node_id: the node's id.
        name: its name.
        version: of FLOps.
        cluster_address: what it dials, as host:port.
        active_addons: the addons that were on at the start.
        report_file: where the daemon tells about itself.
        disclosure: what it reveals about failures of users' code.
        prefers_containers: whether services run in containers where they can.
    """

    node_id: str
    name: str
    version: str
    cluster_address: str
    active_addons: tuple[str, ...]
    report_file: Path
    disclosure: Disclosure = Disclosure.FULL
    prefers_containers: bool = False


class NodeDaemon:
    """Runs the parts of a node until it is stopped.

    Args:
        facts: what the report says.
        supervisor: services.
        addons: addons.
        agent: the link to the cluster.
        caches: what is kept to be used again.
        runtime: knows which limits are enforced.
        clock: for the report's times.
    """

    def __init__(
        self,
        facts: DaemonFacts,
        supervisor: Supervisor,
        addons: Addons,
        agent: NodeAgent,
        caches: NodeCaches,
        runtime: Runtime,
        clock: Clock,
    ) -> None:
        self._facts = facts
        self._supervisor = supervisor
        self._addons = addons
        self._agent = agent
        self._caches = caches
        self._runtime = runtime
        self._clock = clock
        self._started_at_s = clock.now_s()
        self._is_stopping = threading.Event()
        self._is_report_failing = False

    def stop(self) -> None:
        """Have `run` stop the node's services and addons, say goodbye, and return."""
        self._is_stopping.set()

    def run(self) -> None:
        """Run until `stop`."""
        self._supervisor.adopt()
        self._caches.start()  # after it is known which services need what
        self._addons.start()
        agent = threading.Thread(target=self._agent.run, name="agent", daemon=True)
        agent.start()
        self._report_until_stop()
        _log.info("stopping")
        self._caches.close()
        self._supervisor.stop_all("Its node was stopped.")
        self._agent.stop()
        self._addons.stop()
        agent.join(_AGENT_STOP_TIMEOUT_S)
        self._facts.report_file.unlink(missing_ok=True)

    def _report_until_stop(self) -> None:
        told: object = None
        pause_s = 0.0
        while not self._is_stopping.wait(_REPORT_CHECK_S):
            pause_s += _REPORT_CHECK_S
            link = self._agent.link
            states = {i: status.state for i, status in self._supervisor.statuses().items()}
            news = (link, self._addons.states(), states)
            if news != told or pause_s >= HEARTBEAT_INTERVAL_S:
                told, pause_s = news, 0.0
                self._write_report(link)

    def _write_report(self, link: LinkState) -> None:
        try:
            write_durably(self._facts.report_file, self._report(link).model_dump_json(), mode=0o644)
        except FlopsError as error:
            if not self._is_report_failing:
                _log.warning("the node's state is not told: %s", error.message)
            self._is_report_failing = True
        else:
            self._is_report_failing = False

    def _report(self, link: LinkState) -> NodeReport:
        specs = self._supervisor.specs()
        statuses = self._supervisor.statuses(with_usage=True)
        limits, limits_note = self._runtime.limits()
        return NodeReport(
            pid=os.getpid(),
            node_id=self._facts.node_id,
            name=self._facts.name,
            version=self._facts.version,
            started_at_s=self._started_at_s,
            written_at_s=self._clock.now_s(),
            cluster_address=self._facts.cluster_address,
            is_connected=link.is_connected,
            link_detail=link.detail,
            link_since_s=link.since_s,
            active_addons=self._facts.active_addons,
            addons=self._addons.states(),
            data_tags=self._addons.data_tags(),
            services=tuple(
                ServiceLine(kind=specs[i].kind.value, project_id=specs[i].project_id, status=status)
                for i, status in statuses.items()
                if i in specs
            ),
            limits=limits,
            limits_note=limits_note,
            disclosure=self._facts.disclosure,
            prefers_containers=self._facts.prefers_containers,
            caches=self._caches.lines(),
            cache_limit_bytes=self._caches.max_bytes,
        )
