"""When the first round begins, with real connections and played learners."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.testing.played_learner import PlayedLearner
from flops.testing.waiting import until
from flops.trainer import gathering
from flops.trainer.gathering import Gathering
from flops.trainer.links import LearnerServer, Loader
from flops.wire.services import AggregatorConfig
from flops.wire.training import LOADED, LOADING, Message

LIMIT_S = 0.4


class Scene:
    """A server with played learners, and what was told of them."""

    def __init__(self) -> None:
        self.lost: list[Loader] = []
        self.told: list[str] = []
        self.server = LearnerServer("127.0.0.1", 0, "secret", on_lost_loader=self.lost.append)
        self.learners: list[PlayedLearner] = []

    def close(self) -> None:
        for learner in self.learners:
            learner.close()
        self.server.stop()

    def learner(self, number: int, **hello: object) -> PlayedLearner:
        learner = PlayedLearner(self.server.port, f"learner-{number}", hello=hello)
        self.learners.append(learner)
        return learner

    def loader(self, number: int) -> PlayedLearner:
        learner = self.learner(number, is_loading=True)
        until(lambda: learner_is(self, f"learner-{number}"), timeout_s=5.0)
        return learner

    def gather(self, *, least: int, patience_s: float = 5.0, wanted: int = 2) -> None:
        config = AggregatorConfig(
            project_id="p1",
            customer_id="c1",
            flavor="sklearn",
            rounds=1,
            min_available_clients=wanted,
            min_fit_clients=least,
            min_evaluate_clients=1,
            round_timeout_s=0.1,
            load_timeout_s=LIMIT_S,
            learner_token="secret",
            tracking_uri="",
            model_name="model",
        )
        Gathering(self.server, config, tell=self.told.append, patience_s=patience_s).wait(lambda: False)

    def fails(self, **options: float) -> FlopsError:
        with pytest.raises(FlopsError) as failed:
            self.gather(**options)  # type: ignore[arg-type]
        return failed.value


def learner_is(scene: Scene, name: str) -> bool:
    return name in {loader.learner for loader in scene.server.loaders()}


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(gathering, "_GRACE_S", 0.0)
    monkeypatch.setattr(gathering, "_LOOK_S", 0.05)
    scene = Scene()
    yield scene
    scene.close()


def test_it_goes_on_without_who_stands_still(scene: Scene) -> None:
    scene.learner(1)
    scene.loader(2)
    scene.gather(least=1)
    assert scene.told[-1] == (
        "learner-2 on node-of-learner-2 is not waited for any longer: "
        "It has loaded for 0.4 s without a new row."
    )


def test_who_is_needed_and_stands_still_is_named(scene: Scene) -> None:
    scene.learner(1)
    scene.loader(2)
    error = scene.fails(least=2)
    assert error.code is ErrorCode.TOO_FEW_LEARNERS
    assert error.message == (
        "2 learners are needed for a round (learner-1: joined on node-of-learner-1; "
        "learner-2: It has loaded for 0.4 s without a new row)."
    )


def test_who_says_that_its_time_is_up_is_not_waited_for(scene: Scene) -> None:
    scene.learner(1)
    late = FlopsError(ErrorCode.TIMEOUT, "It loaded for ever.", details={"traceback": "line 7"})
    scene.learner(2, error=late.to_dict())
    assert scene.fails(least=2).details["traceback"] == "line 7"
    scene.gather(least=1)


def test_another_refusal_may_pass(scene: Scene) -> None:
    scene.learner(1)
    scene.learner(2, error=FlopsError(ErrorCode.UNREACHABLE, "No data server.").to_dict())
    error = scene.fails(least=1, patience_s=0.5)
    assert "joined within 0.5 s: learner-1" in error.message
    assert "learner-2: No data server" in error.message


def test_who_gets_rows_is_waited_for_beyond_all_patience(scene: Scene) -> None:
    scene.learner(1)
    slow = scene.loader(2)
    joins = threading.Thread(target=_load_slowly, args=(scene, slow))
    joins.start()
    began_s = time.monotonic()
    scene.gather(least=2, patience_s=0.2)
    joins.join()
    assert time.monotonic() - began_s > 3 * LIMIT_S
    assert scene.lost == []


def _load_slowly(scene: Scene, learner: PlayedLearner) -> None:
    pause = threading.Event()
    for rows in range(1, 9):
        pause.wait(LIMIT_S / 2)
        learner.stream.send(Message(LOADING, {"rows": rows}))
    learner.stream.send(Message(LOADED))
    scene.learner(2)


def test_who_is_killed_while_it_loads_is_told_at_once(scene: Scene) -> None:
    scene.loader(1).close()
    until(lambda: bool(scene.lost), timeout_s=2.0)
    assert (scene.lost[0].learner, scene.server.loaders()) == ("learner-1", [])


def test_who_has_loaded_is_not_lost(scene: Scene) -> None:
    scene.loader(1).stream.send(Message(LOADED))
    until(lambda: scene.server.loaders() == [], timeout_s=2.0)
    assert scene.lost == []
