"""Streams of a training between machines: encrypted, and to the project's own aggregator only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import flight

from flops.adapters.certificates import FileAuthority
from flops.adapters.node_identity import new_key, signing_request
from flops.durable_file import write_durably
from flops.testing.waiting import until
from flops.trainer.dialling import Dial
from flops.trainer.links import LearnerServer, Link
from flops.wire.flight import aggregator_name

PROJECT = "p1"


class Site:
    """A cluster's authority, and aggregators that encrypt."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = FileAuthority(folder / "authority.pem", time.time())

    def identity_of(self, project_id: str) -> str:
        key, name = new_key(), aggregator_name(project_id)
        signed = self.authority.sign_service(signing_request(key), name, time.time(), 3_600.0)
        write_durably(self.folder / "identity.pem", key + signed + self.authority.pem)
        return str(self.folder / "identity.pem")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@contextmanager
def aggregator(identity: str) -> Iterator[tuple[str, list[Link]]]:
    joined: list[Link] = []
    server = LearnerServer("127.0.0.1", 0, "token", identity=identity, on_join=joined.append)
    try:
        yield f"127.0.0.1:{server.port}", joined
    finally:
        server.stop(is_over=False)


def test_a_learner_joins_by_an_encrypted_stream(site: Site) -> None:
    with aggregator(site.identity_of(PROJECT)) as (address, joined):
        dial = Dial(address, "token", "learner-1", "node-1", PROJECT, site.authority.pem)
        with dial.connect({"rows": 1}):
            until(lambda: [link.learner for link in joined] == ["learner-1"], "the learner has joined")


@pytest.mark.parametrize(
    ("served", "is_encrypted"),
    [("another-project", True), (PROJECT, False), ("", True)],
    ids=["to another project's aggregator", "in the clear", "to one that does not encrypt"],
)
def test_a_learner_goes_nowhere_else(site: Site, served: str, is_encrypted: bool) -> None:
    with aggregator(site.identity_of(served) if served else "") as (address, joined):
        authority = site.authority.pem if is_encrypted else ""
        dial = Dial(address, "token", "learner-1", "node-1", PROJECT, authority)
        with pytest.raises(flight.FlightError), dial.connect({"rows": 1}) as stream:
            stream.receive()
        assert joined == []


def test_a_learner_trusts_no_other_authority(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other")
    with aggregator(site.identity_of(PROJECT)) as (address, joined):
        dial = Dial(address, "token", "learner-1", "node-1", PROJECT, other.authority.pem)
        with pytest.raises(flight.FlightError), dial.connect({"rows": 1}) as stream:
            stream.receive()
        assert joined == []
