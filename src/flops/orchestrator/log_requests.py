"""Requests for the output of services, waiting for the answers of nodes."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from flops.core.ids import NodeId, ServiceId
from flops.core.output import Output
from flops.errors import ErrorCode, FlopsError
from flops.wire.node import CommandResult, FetchLogs

ANSWER_TIMEOUT_S = 5.0


class LogRequest:
    """One request: send `command` to the node, then `wait`."""

    def __init__(self, node_id: NodeId, command: FetchLogs, answer: Future[CommandResult]) -> None:
        self.node_id = node_id
        self.command = command
        self.answer = answer


class LogRequests:
    """The open requests of a cluster; thread-safe.

    Args:
        timeout_s: how long an answer may take.
    """

    def __init__(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._open: dict[str, LogRequest] = {}

    def begin(self, node_id: NodeId, service_id: ServiceId, after: int | None, tail_bytes: int) -> LogRequest:
        """Make a request and remember it."""
        command = FetchLogs(
            request_id=uuid.uuid4().hex, service_id=service_id, after=after, tail_bytes=tail_bytes
        )
        request = LogRequest(node_id, command, Future())
        with self._lock:
            self._open[command.request_id] = request
        return request

    def wait(self, request: LogRequest, node_name: str) -> Output:
        """Wait for a request's answer, and forget the request.

        Raises:
            FlopsError: ``timeout``, ``node_lost``, or what the node answered.
        """
        try:
            result = request.answer.result(timeout=self._timeout_s)
        except FutureTimeoutError as exc:
            raise FlopsError(
                ErrorCode.TIMEOUT,
                f"Node {node_name} did not send the output of {request.command.service_id}"
                f" within {self._timeout_s:g} s.",
            ) from exc
        finally:
            with self._lock:
                self._open.pop(request.command.request_id, None)
        if result.error is not None:
            raise FlopsError.from_dict(result.error)
        return result.output

    def answer(self, node_id: NodeId, result: CommandResult) -> None:
        """Take in a node's answer; one that nobody waits for is ignored."""
        with self._lock:
            request = self._open.get(result.request_id)
            if request is not None and request.node_id == node_id:
                del self._open[result.request_id]
                request.answer.set_result(result)

    def fail_all(self, node_id: NodeId, error: FlopsError) -> None:
        """The node's connection has ended: nothing it was asked for will come."""
        with self._lock:
            lost = [request for request in self._open.values() if request.node_id == node_id]
            for request in lost:
                del self._open[request.command.request_id]
                request.answer.set_exception(error)
