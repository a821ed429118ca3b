"""The mock data provider as a process, as a node starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flops.actor import ActorContext
from flops.adapters.memory_fragments import MemoryFragments
from flops.adapters.system_clock import SystemClock
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import CATALOGUE, ErrorCode
from flops.wire.actor_events import DataPushed, Failed, parse_actor_event
from flops.wire.flight import Right, Scope, mint_token


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(MemoryFragments(SystemClock()))


@pytest.fixture
def address(catalogue: Catalogue) -> Iterator[str]:
    with DataServer(catalogue, "secret", "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.port}"


def provide(folder: Path, address: str, **configuration: Any) -> tuple[int, list[Any]]:
    folder.mkdir()
    context = ActorContext(
        service_id="mock-data-provider-1",
        project_id="1",
        node_name="node-1",
        work_dir=str(folder),
        data_address=address,
        data_token=mint_token("secret", Scope(Right.WRITE, ("digits",))),
        config={
            "mock_data_id": "1",
            "configuration": {"dataset_name": "digits", "number_of_partitions": 4, **configuration},
            "partitions": [1, 3],
        },
    )
    argv = [sys.executable, "-m", "flops.wiring", "mock-data-provider", str(context.save())]
    done = subprocess.run(argv, check=False, capture_output=True, timeout=50)
    lines = (folder / "events.jsonl").read_text().splitlines()
    return done.returncode, [parse_actor_event(json.loads(line)) for line in lines]


def test_partitions_are_sent_and_told(tmp_path: Path, address: str, catalogue: Catalogue) -> None:
    exit_code, events = provide(tmp_path / "work", address, data_tag="digits")
    assert exit_code == 0
    pushed = [event for event in events if isinstance(event, DataPushed)]
    assert [(event.data_tag, event.partition) for event in pushed] == [("digits", 1), ("digits", 3)]
    assert sum(event.rows for event in pushed) == catalogue.tags()[0].rows


def test_a_failure_is_told_and_is_the_exit_code(tmp_path: Path, address: str, catalogue: Catalogue) -> None:
    exit_code, events = provide(tmp_path / "work", address, data_tag="other")
    assert exit_code == CATALOGUE[ErrorCode.FORBIDDEN].exit_code
    assert isinstance(events[-1], Failed)
    assert events[-1].error["code"] == "forbidden"
    assert catalogue.tags() == []
