"""Who is joined, who has answered: with real connections and played learners."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import flight

from flops.errors import ErrorCode, FlopsError
from flops.testing.played_learner import PlayedLearner, echo
from flops.trainer import links
from flops.trainer.links import Instruction, LearnerServer, Link
from flops.wire.keepalive import keep_connections_alive
from flops.wire.training import REPLY, TRAIN, Message, encode_arrays


class Room:
    """A server with what it told, and learners that are closed at the end."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.server = LearnerServer(
            "127.0.0.1",
            0,
            "secret",
            on_join=lambda link: self.told.append(("join", link.learner)),
            on_leave=lambda link, _: self.told.append(("leave", link.learner)),
        )
        self.learners: list[PlayedLearner] = []

    def join(self, name: str, **options: object) -> PlayedLearner:
        before = len(self.told)
        learner = PlayedLearner(self.server.port, name, **options)  # type: ignore[arg-type]
        self.learners.append(learner)
        assert self.server.wait_until(lambda: ("join", name) in self.told[before:], 10)
        return learner

    def ask(self, *names: str, timeout_s: float = 10.0) -> dict[str, tuple[Message | None, str]]:
        instruction = Instruction(TRAIN, {"round": 1}, encode_arrays([np.arange(3.0)]))
        links = [link for link in self.server.joined() if link.learner in names]
        requests = self.server.send([(link, instruction) for link in links])
        self.server.wait_until(lambda: all(request.is_settled for request in requests), timeout_s)
        return {request.link.learner: self.server.take(request) for request in requests}


@pytest.fixture
def room() -> Iterator[Room]:
    room = Room()
    yield room
    for learner in room.learners:
        learner.close()
    room.server.stop()


def test_no_more_answers_come_in_than_memory_is_there_for(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "_HELD_BYTES", 50)  # of answers of 24
    names = [f"learner-{number}" for number in range(6)]
    for name in names:
        room.join(name)
    instruction = Instruction(TRAIN, {"round": 1}, encode_arrays([np.arange(3.0)]))
    requests = room.server.send([(link, instruction) for link in room.server.joined()])

    def held() -> list[str]:
        return [link.learner for link in room.server.joined() if link.held_bytes]

    def all_but(count: int) -> bool:
        """Whether all that have not been freed are held, or wait."""
        waiting = sum(link.waits_for_room for link in room.server.joined())
        return bool(held()) and waiting + len(held()) == len(names) - count

    freed: list[str] = []
    while len(freed) < len(names):
        assert room.server.wait_until(lambda: all_but(len(freed)), 10)
        assert 1 <= len(held()) <= 3  # two, and the first of all
        request = next(one for one in requests if one.link.learner == held()[0])
        assert room.server.wait_until(lambda: request.is_settled, 10)  # noqa: B023 (called at once)
        assert room.server.take(request)[0] is not None
        freed.append(request.link.learner)
        room.server.free(freed[-1])
    assert sorted(freed) == names


def test_all_are_asked_at_once_and_answer(room: Room) -> None:
    barrier = threading.Barrier(3, timeout=10)

    def together(message: Message) -> Message:
        barrier.wait()
        return echo(message)

    for number in range(3):
        room.join(f"learner-{number}", respond=together)
    answers = room.ask("learner-0", "learner-1", "learner-2")
    for answer, reason in answers.values():
        assert answer is not None
        assert reason == ""
        np.testing.assert_array_equal(answer.arrays[0], np.arange(3.0))


def test_who_leaves_is_noticed_at_once(room: Room) -> None:
    learner = room.join("a", respond=lambda _: None)
    started = time.monotonic()
    threading.Timer(0.1, learner.close).start()
    answers = room.ask("a", timeout_s=30)
    assert time.monotonic() - started < 5
    assert answers["a"][0] is None
    assert answers["a"][1]
    assert room.server.wait_until(lambda: ("leave", "a") in room.told, 5)
    assert room.server.joined() == []


def test_who_is_late_is_busy_until_it_answers_and_the_late_answer_is_not_taken_for_another(
    room: Room,
) -> None:
    go_on = threading.Event()

    def late_once(message: Message) -> Message:
        go_on.wait(10)
        return echo(message)

    room.join("a", respond=late_once)
    assert room.ask("a", timeout_s=0.05)["a"] == (None, "")
    assert room.server.idle() == []
    assert [link.learner for link in room.server.joined()] == ["a"]
    go_on.set()
    assert room.server.wait_until(lambda: bool(room.server.idle()), 10)
    answer, _ = room.ask("a")["a"]
    assert answer is not None
    assert answer.header["id"] == 2


def test_who_joins_anew_replaces_its_old_connection(room: Room) -> None:
    room.join("a", respond=lambda _: None)
    room.join("a")
    answer, _ = room.ask("a")["a"]
    assert answer is not None
    assert len(room.server.joined()) == 1


def test_who_has_left_answers_nothing(room: Room) -> None:
    learner = room.join("a")
    (link,) = room.server.joined()
    learner.close()
    assert room.server.wait_until(lambda: not room.server.joined(), 10)
    (request,) = room.server.send([(link, Instruction(TRAIN, {}, encode_arrays([])))])
    assert request.is_settled
    answer, reason = room.server.take(request)
    assert answer is None
    assert reason
    assert room.server.away() == {"a"}


def test_a_wrong_token_is_refused_before_anything_is_read(room: Room) -> None:
    def call(headers: list[tuple[bytes, bytes]]) -> None:
        descriptor = flight.FlightDescriptor.for_command(b"flops-training")
        with flight.FlightClient(f"grpc://127.0.0.1:{room.server.port}") as client:
            client.do_exchange(descriptor, flight.FlightCallOptions(headers=headers))[1].read_chunk()

    for headers in ([(b"authorization", b"Bearer guess")], []):
        with pytest.raises(flight.FlightUnauthenticatedError):
            call(headers)
    assert room.told == []


def test_garbage_does_not_disturb(room: Room) -> None:
    room.join("a")
    with socket.create_connection(("127.0.0.1", room.server.port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
    odd = PlayedLearner(room.server.port, "odd")
    odd.stream.send(Message("nonsense"))
    odd.stream.send(Message(REPLY, {"id": 77}))
    room.learners.append(odd)
    assert room.server.wait_until(lambda: ("join", "odd") in room.told, 10)
    assert all(answer is not None for answer, _ in room.ask("a", "odd").values())


def test_who_cannot_load_is_remembered_until_it_joins(room: Room) -> None:
    error = FlopsError(ErrorCode.NO_MATCHING_DATA, "There is no data.")
    refused = PlayedLearner(room.server.port, "a", hello={"error": error.to_dict()})
    room.learners.append(refused)
    assert room.server.wait_until(lambda: bool(room.server.refusals()), 10)
    node, found = room.server.refusals()["a"]
    assert (node, found.code) == ("node-of-a", ErrorCode.NO_MATCHING_DATA)
    room.join("a")
    assert room.server.refusals() == {}


def test_all_are_told_to_stop(room: Room) -> None:
    learners = [room.join(f"learner-{n}") for n in range(3)]
    room.server.stop()
    assert all(learner.is_stopped for learner in learners)
    assert ("leave", "learner-0") not in room.told


def test_a_port_that_is_taken_is_told(room: Room) -> None:
    with pytest.raises(FlopsError) as caught:
        LearnerServer("127.0.0.1", room.server.port, "secret")
    assert caught.value.code is ErrorCode.PORT_OCCUPIED


def test_twenty_learners_answer_many_rounds(room: Room) -> None:
    names = [f"learner-{n:02}" for n in range(20)]
    for name in names:
        room.join(name)
    for _ in range(10):
        assert all(answer is not None for answer, _ in room.ask(*names).values())


def test_the_kernel_watches_over_connections(room: Room) -> None:
    """Both ends are here: the learner's and the server's."""
    room.join("a")
    assert keep_connections_alive(room.server.port) == 2
    options = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if room.server.port in (connection.getsockname()[1], connection.getpeername()[1]):
                options.append(
                    (
                        connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
                        connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
                    )
                )
    assert options == [(1, 8000)] * 2


def test_watching_over_connections_leaks_no_descriptor(room: Room) -> None:
    room.join("a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        keep_connections_alive(room.server.port)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_links_compare_by_identity(room: Room) -> None:
    room.join("a")
    (link,) = room.server.joined()
    assert isinstance(link, Link)
    assert (link.node, link.rows) == ("node-of-a", 10)
