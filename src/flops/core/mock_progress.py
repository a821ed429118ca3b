"""How a mock data provider's record follows what its services report."""

from __future__ import annotations

from flops.core.cluster import ServiceState
from flops.core.ids import ServiceId
from flops.core.project import Failure, MockData

RUNNING, COMPLETED, FAILED = "running", "completed", "failed"


def after_push(mock_data: MockData, rows: int, seq: int) -> MockData:
    """Rows were stored on a node. A cluster event that was taken in before changes nothing."""
    if seq <= mock_data.cluster_seq:
        return mock_data
    return mock_data.model_copy(update={"rows": mock_data.rows + rows, "cluster_seq": seq})


def after_failure(mock_data: MockData, failure: Failure, seq: int) -> MockData:
    """A provider told why it ends; the first reason is kept."""
    if seq <= mock_data.cluster_seq:
        return mock_data
    return _failed(mock_data, failure).model_copy(update={"cluster_seq": seq})


def after_change(
    mock_data: MockData, service: ServiceId, state: ServiceState, failure: Failure | None, seq: int
) -> MockData:
    """A provider's state has changed. All have to complete; one failure is the record's failure."""
    if seq <= mock_data.cluster_seq or not state.is_final or service in mock_data.ended:
        return mock_data
    ended = (*mock_data.ended, service)
    mock_data = mock_data.model_copy(update={"ended": ended, "cluster_seq": seq})
    if state is not ServiceState.COMPLETED:
        default = Failure(code="service_failed", message=f"{service} has {state.value}.")
        return _failed(mock_data, failure or default)
    if mock_data.state == RUNNING and set(ended) >= set(mock_data.services):
        return mock_data.model_copy(update={"state": COMPLETED})
    return mock_data


def _failed(mock_data: MockData, failure: Failure) -> MockData:
    if mock_data.failure is not None:
        return mock_data
    return mock_data.model_copy(update={"state": FAILED, "failure": failure})
