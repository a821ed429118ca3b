"""Mock data providers: one service per chosen learner node, and the record of how far they are."""

from __future__ import annotations

import logging
import secrets
import threading

from flops.core.cluster import ClusterEvent, ServiceKind, ServiceStatus
from flops.core.ids import Digest, make_service_id
from flops.core.mock_progress import RUNNING, after_change, after_failure, after_push
from flops.core.placement import place_mock_providers
from flops.core.project import Failure, MockData
from flops.core.sla import MockDataSla
from flops.errors import ErrorCode, FlopsError
from flops.manager.service_specs import assign_partitions, mock_provider_specs
from flops.manager.translation import failure_of
from flops.ports import Blobs, Clock, Orchestrator, ProjectStore
from flops.wire.actor_events import DataPushed, Failed, parse_actor_event

_log = logging.getLogger(__name__)


class MockDataProviders:
    """Starts mock data providers and keeps their records.

    Args:
        store: keeps the records.
        orchestrator: runs the services.
        blobs: holds datasets that users send along.
        clock: stamps the records.
    """

    def __init__(self, store: ProjectStore, orchestrator: Orchestrator, blobs: Blobs, clock: Clock) -> None:
        self._store = store
        self._orchestrator = orchestrator
        self._blobs = blobs
        self._clock = clock
        self._lock = threading.Lock()

    def create(self, sla: MockDataSla, dataset_blob: str | None) -> MockData:
        """Choose nodes, and start a provider on each.

        Raises:
            FlopsError: ``placement_impossible``; ``not_found`` when the dataset's blob is not stored.
        """
        if dataset_blob is not None and not self._blobs.has(Digest(dataset_blob)):
            raise FlopsError(
                ErrorCode.NOT_FOUND,
                f"dataset_blob {dataset_blob!r} is not stored.",
                hint="Send the file to POST /api/flops/blobs first; the answer has its digest.",
            )
        configuration = sla.mock_data_configuration
        nodes = place_mock_providers(self._orchestrator.nodes(), configuration.number_of_nodes)
        names = {node.id: node.name for node in nodes}
        shares = assign_partitions(list(names), configuration.number_of_partitions)
        mock_id = secrets.token_hex(6)
        mock_data = MockData(
            id=mock_id,
            sla=sla.model_dump(mode="json", by_alias=True),
            services=tuple(
                make_service_id(ServiceKind.MOCK_DATA_PROVIDER.value, mock_id, number + 1)
                for number in range(len(shares))
            ),
            nodes=tuple(names[node_id] for node_id in shares),
            node_ids=tuple(shares),
            created_at_s=self._clock.now_s(),
            dataset_blob=dataset_blob,
        )
        self._store.put_mock_data(mock_data)
        self._start(mock_data)
        return mock_data

    def resume(self) -> None:
        """Start what a kill of the manager kept from being started."""
        for mock_data in self._store.list_mock_data():
            if mock_data.state == RUNNING:
                self._start(mock_data)

    def find(self, mock_id: str) -> MockData | None:
        """The record with this id, None when there is none."""
        return next((m for m in self._store.list_mock_data() if m.id == mock_id), None)

    def take_in(self, event: ClusterEvent) -> None:
        """Bring a record up to date; an event of something else changes nothing."""
        with self._lock:
            before = self.find(event.project_id)
            if before is None:
                return
            after = _after(before, event)
            if after != before:
                self._store.put_mock_data(after)

    def _start(self, mock_data: MockData) -> None:
        try:
            for spec in mock_provider_specs(mock_data):
                self._orchestrator.start_service(spec)
        except FlopsError as exc:
            failure = Failure.model_validate(exc.to_dict())
            with self._lock:
                current = self.find(mock_data.id) or mock_data
                self._store.put_mock_data(current.model_copy(update={"state": "failed", "failure": failure}))
            for service_id in mock_data.services:
                self._orchestrator.stop_service(service_id)
            _log.warning("mock data provider %s could not be started: %s", mock_data.id, exc)


def _after(mock_data: MockData, event: ClusterEvent) -> MockData:
    if event.kind == "service":
        status = ServiceStatus.model_validate(event.payload)
        failure = failure_of(status.error) if status.error else None
        return after_change(mock_data, status.service_id, status.state, failure, event.seq)
    if event.kind != "actor":
        return mock_data
    match parse_actor_event(event.payload):
        case DataPushed(rows=rows):
            return after_push(mock_data, rows, event.seq)
        case Failed(error=error):
            return after_failure(mock_data, failure_of(error), event.seq)
        case _:
            return mock_data
