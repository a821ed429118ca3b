"""Every round is recorded in order, whatever the tracking server does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import pytest

from flops.adapters.memory_tracker import MemoryTracker
from flops.core.ids import ProjectId
from flops.core.project import Round
from flops.errors import ErrorCode, FlopsError
from flops.tracker_port import Tracker
from flops.trainer.tracking_feed import TrackedRun, TrackingFeed

PROJECT = ProjectId("p1")
AWAY = FlopsError(ErrorCode.UNREACHABLE, "MLflow is away.")


def make(
    make_tracker: Callable[[], Tracker], on_open: Callable[[TrackedRun], None] = lambda _: None
) -> TrackingFeed:
    params: Mapping[str, str] = {"strategy": "FedAvg"}
    return TrackingFeed(make_tracker, PROJECT, params, {"tag": "value"}, on_open)


def test_rounds_are_recorded_and_the_run_is_told() -> None:
    tracker = MemoryTracker()
    told: list[TrackedRun] = []
    feed = make(lambda: tracker, told.append)
    feed.add([Round(number=1), Round(number=2)])
    _, run = feed.wait(10)
    assert told == [run]
    feed.close(has_failed=False, patience_s=5)
    recorded = tracker.runs[PROJECT]
    assert (sorted(recorded.rounds), recorded.status) == ([1, 2], "RUNNING")  # its end is the delivery
    assert (recorded.params, recorded.tags) == ({"strategy": "FedAvg"}, {"tag": "value"})


def test_what_was_missed_is_recorded_later() -> None:
    tracker = MemoryTracker()
    tracker.problem = AWAY
    feed = make(lambda: tracker)
    feed.add([Round(number=1)])
    with pytest.raises(FlopsError) as caught:
        feed.wait(0.2)
    assert caught.value.code is ErrorCode.TRACKING_FAILED
    assert "MLflow is away." in caught.value.message
    tracker.problem = None
    feed.wait(10)
    feed.close(has_failed=True, patience_s=5)
    assert tracker.runs[PROJECT].status == "FAILED"


def test_a_server_that_was_there_is_waited_for_longer_than_one_that_never_was() -> None:
    tracker = MemoryTracker()
    feed = make(lambda: tracker)
    feed.wait(10)
    tracker.problem = AWAY
    feed.add([Round(number=1)])
    back = threading.Timer(0.8, lambda: setattr(tracker, "problem", None))
    back.start()
    feed.wait(0.2, away_patience_s=60)
    assert sorted(tracker.runs[PROJECT].rounds) == [1]
    feed.close(has_failed=False, patience_s=5)
    back.join()

    tracker.problem = AWAY
    feed = make(lambda: tracker)
    with pytest.raises(FlopsError):
        feed.wait(0.2, away_patience_s=60)
    feed.close(has_failed=True, patience_s=0.1)


def test_a_defect_of_the_tracker_is_told_and_does_not_end_the_feed() -> None:
    tracker = MemoryTracker()
    is_broken = threading.Event()
    is_broken.set()

    def make_tracker() -> Tracker:
        if is_broken.is_set():
            raise KeyError("oops")
        return tracker

    feed = make(make_tracker)
    with pytest.raises(FlopsError, match="KeyError"):
        feed.wait(0.2)
    is_broken.clear()
    feed.wait(10)
    feed.close(has_failed=False, patience_s=5)


def test_closing_never_waits_longer_than_told() -> None:
    tracker = MemoryTracker()
    tracker.problem = AWAY
    feed = make(lambda: tracker)
    feed.close(has_failed=True, patience_s=0.1)
    assert not any(thread.name == "tracking" and thread.is_alive() for thread in threading.enumerate())
