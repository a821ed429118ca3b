"""Whatever happens between a node and its cluster, every line of an event log arrives once, in order."""

from __future__ import annotations

import json
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from flops.node import event_log
from flops.node.event_log import EventLogReader


class EventLogMachine(RuleBasedStateMachine):
    """A service writes, a node reads and sends, a cluster stores and acknowledges; each may be cut off."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "events.jsonl"
        self._written = 0
        self._stored: list[int] = []
        self._to_cluster: deque[tuple[int, dict[str, Any]]] = deque()
        self._to_node: deque[int] = deque()
        self._reader = EventLogReader(self._path, 0)

    def teardown(self) -> None:
        self._folder.cleanup()

    @rule(count=st.integers(1, 150))
    def write(self, count: int) -> None:
        with self._path.open("a") as file:
            for _ in range(count):
                self._written += 1
                file.write(json.dumps({"number": self._written}) + "\n")

    @rule()
    def send(self) -> None:
        self._to_cluster.extend(self._reader.next_lines(is_final=False))

    @rule(count=st.integers(1, 50))
    def store(self, count: int) -> None:
        for _ in range(min(count, len(self._to_cluster))):
            line, event = self._to_cluster.popleft()
            if line == len(self._stored) + 1:
                self._stored.append(event["number"])
            self._to_node.append(len(self._stored))

    @rule(count=st.integers(1, 50))
    def acknowledge(self, count: int) -> None:
        for _ in range(min(count, len(self._to_node))):
            self._reader.acknowledge(self._to_node.popleft())

    @rule()
    def lose_the_connection(self) -> None:
        self._to_cluster.clear()
        self._to_node.clear()
        self._reader = EventLogReader(self._path, len(self._stored))

    @rule()
    def lose_the_newest_lines_at_the_cluster(self) -> None:
        """The cluster is set back to an older state, as by a restored backup."""
        del self._stored[len(self._stored) // 2 :]
        self.lose_the_connection()

    @invariant()
    def what_is_stored_is_the_log(self) -> None:
        assert self._stored == list(range(1, len(self._stored) + 1))
        assert len(self._stored) <= self._written

    @rule()
    def everything_arrives(self) -> None:
        for _ in range(20 + 2 * self._written // event_log.WINDOW_LINES):
            self.send()
            self.store(10_000)
            self.acknowledge(10_000)
        assert len(self._stored) == self._written
        assert self._reader.is_drained()


TestEventLog = EventLogMachine.TestCase
TestEventLog.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
