"""Order and repetition of effects."""

from __future__ import annotations

import threading
from collections import defaultdict

from flops.core.effects import Effect, EffectKind
from flops.core.ids import ProjectId
from flops.manager.executor import EffectExecutor


def effect(key: str, project_id: str, kind: EffectKind = EffectKind.STOP_SERVICES) -> Effect:
    return Effect(key=key, project_id=ProjectId(project_id), kind=kind)


def test_effects_of_one_project_run_in_order_and_those_of_others_beside() -> None:
    order: dict[str, list[str]] = defaultdict(list)
    both_run = threading.Barrier(2)
    done = threading.Semaphore(0)

    def perform(one: Effect, attempts: int, _waited_s: float) -> float | None:
        if one.key.endswith("0") and attempts == 0:
            both_run.wait(5)
            return 0.01  # again: what follows must wait
        order[one.project_id].append(one.key)
        done.release()
        return None

    executor = EffectExecutor(perform, 3)
    executor.start()
    executor.submit(effect(f"{p}{n}", p) for n in range(5) for p in ("a", "b"))
    for _ in range(10):
        assert done.acquire(timeout=5)
    executor.close()
    assert order == {p: [f"{p}{n}" for n in range(5)] for p in ("a", "b")}


def test_a_slow_repository_does_not_hold_up_its_projects_stop() -> None:
    release, stopped = threading.Event(), threading.Event()

    def perform(one: Effect, _attempts: int, _waited_s: float) -> float | None:
        if one.kind is EffectKind.RESOLVE_REPOSITORY:
            release.wait(5)
        else:
            stopped.set()
        return None

    executor = EffectExecutor(perform, 2)
    executor.start()
    executor.submit([effect("r", "a", EffectKind.RESOLVE_REPOSITORY), effect("s", "a")])
    assert stopped.wait(5)
    release.set()
    executor.close()


def test_attempts_are_counted_and_closing_leaves_the_rest() -> None:
    attempts: list[int] = []
    tried = threading.Event()

    def perform(_one: Effect, attempt: int, waited_s: float) -> float | None:
        attempts.append(attempt)
        assert waited_s >= 0
        if attempt == 2:
            tried.set()
            return 60.0
        return 0.0

    executor = EffectExecutor(perform, 1)
    executor.start()
    executor.submit([effect("k", "a"), effect("never", "a")])
    assert tried.wait(5)
    executor.close()
    assert attempts == [0, 1, 2]


def test_an_effect_that_raises_is_tried_again_later_and_stops_no_other() -> None:
    done = threading.Event()

    def perform(one: Effect, _attempts: int, _waited_s: float) -> float | None:
        if one.project_id == "bad":
            raise RuntimeError("the store is away")
        done.set()
        return None

    executor = EffectExecutor(perform, 1)
    executor.start()
    executor.submit([effect("x", "bad"), effect("y", "good")])
    assert done.wait(5)
    executor.close()
