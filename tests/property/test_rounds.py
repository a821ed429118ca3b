"""Rules of rounds hold for all histories and outcomes."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flops.core.project import Round
from flops.core.rounds import (
    Outcome,
    Part,
    Verdict,
    best_round,
    failure_of,
    has_numbers,
    judge,
    next_in_turn,
    reason_to_end,
)
from flops.core.sla import EarlyStopping, TargetMetric
from flops.errors import ErrorCode, FlopsError

numbers = st.none() | st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1)
histories = st.lists(st.tuples(numbers, numbers), max_size=12).map(
    lambda pairs: [Round(number=n, accuracy=a, loss=lo) for n, (a, lo) in enumerate(pairs, 1)]
)
outcomes = st.lists(st.sampled_from(Outcome), max_size=8)


def parts_of(found: list[Outcome]) -> list[Part]:
    error = FlopsError(ErrorCode.USER_CODE_FAILED, "It broke.", details={"traceback": "line 3"}).to_dict()
    return [
        Part(
            learner=f"learner-{n}",
            node=f"node-{n}",
            outcome=outcome,
            error=error if outcome is Outcome.USER_CODE else None,
        )
        for n, outcome in enumerate(found)
    ]


@given(histories)
def test_no_round_is_better_than_the_best(history: list[Round]) -> None:
    best = best_round(history)
    assert (best is None) == (not any(map(has_numbers, history)))
    if best is None:
        return
    accuracies = [r.accuracy for r in history if r.accuracy is not None and math.isfinite(r.accuracy)]
    if accuracies:
        assert best.accuracy == max(accuracies)
        tied = [r for r in history if r.accuracy == best.accuracy]
    else:
        tied = history
    losses = [r.loss for r in tied if r.loss is not None and math.isfinite(r.loss)]
    if losses:
        assert best.loss == min(losses)
        assert best.number == next(r.number for r in tied if r.loss == best.loss)


@given(histories, histories)
def test_the_best_round_of_two_halves_is_the_best_of_their_bests(a: list[Round], b: list[Round]) -> None:
    b = [r.model_copy(update={"number": r.number + len(a)}) for r in b]
    bests = [best for half in (a, b) if (best := best_round(half)) is not None]
    assert best_round(a + b) == best_round(bests) or not (a + b)


@given(outcomes, st.integers(1, 8))
def test_a_phase_goes_on_exactly_when_enough_are_done(found: list[Outcome], needed: int) -> None:
    verdict = judge(parts_of(found), needed=needed)
    assert (verdict is Verdict.GO_ON) == (found.count(Outcome.DONE) >= needed)


@given(outcomes, st.integers(1, 8))
def test_a_phase_fails_at_once_only_when_its_code_or_answers_are_bad(
    found: list[Outcome], needed: int
) -> None:
    if judge(parts_of(found), needed=needed) is Verdict.FAIL:
        bad = found.count(Outcome.USER_CODE) + found.count(Outcome.REFUSED)
        assert bad > 0
        assert len(found) - bad < needed


@given(outcomes, st.integers(1, 8), st.integers(0, 4), st.integers(0, 4))
def test_a_phase_ends_no_earlier_for_learners_at_work_or_away(
    found: list[Outcome], needed: int, working: int, away: int
) -> None:
    verdict = judge(parts_of(found), needed=needed, working=working, away=away)
    alone = judge(parts_of(found), needed=needed)
    if alone is Verdict.GO_ON:
        assert verdict is (Verdict.WAIT if working else Verdict.GO_ON)
    if verdict is Verdict.FAIL:
        assert alone is Verdict.FAIL
    if working + away >= needed:
        assert verdict is not Verdict.FAIL


@given(outcomes, st.integers(1, 8))
def test_every_failure_names_every_learner(found: list[Outcome], needed: int) -> None:
    error = failure_of("train", 4, parts_of(found), needed=needed, waited_s=9)
    assert error.details["round"] == 4
    assert set(error.details["learners"]) == {f"learner-{n}" for n in range(len(found))}
    if Outcome.USER_CODE in found:
        assert error.code is ErrorCode.USER_CODE_FAILED
        assert error.details["traceback"] == "line 3"
        assert error.details["node"] == f"node-{found.index(Outcome.USER_CODE)}"
    else:
        assert error.code in {ErrorCode.ROUND_FAILED, ErrorCode.TOO_FEW_LEARNERS}
        assert all(f"learner-{n}" in error.message for n in range(len(found)))


@given(histories, st.integers(1, 5), st.floats(0, 0.5))
def test_patience_is_never_over_before_enough_rounds(
    history: list[Round], patience: int, min_delta: float
) -> None:
    early = EarlyStopping(patience=patience, min_delta=min_delta)
    if len(history) < patience:
        assert reason_to_end(history, None, early) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10, unique=True), st.integers(1, 5))
def test_growing_accuracy_never_ends_a_training(values: list[float], patience: int) -> None:
    history = [Round(number=n, accuracy=value) for n, value in enumerate(sorted(values), 1)]
    assert reason_to_end(history, None, EarlyStopping(patience=patience)) is None


@given(histories, st.sampled_from(["accuracy", "loss"]), st.floats(0, 1))
def test_a_target_ends_the_training_exactly_when_it_is_reached(
    history: list[Round], name: str, value: float
) -> None:
    reason = reason_to_end(history, TargetMetric(name=name, value=value), None)
    last = getattr(history[-1], name) if history else None
    is_reached = (
        last is not None and math.isfinite(last) and (last >= value if name == "accuracy" else last <= value)
    )
    assert (reason is not None) == is_reached


@given(st.permutations("abcdef"), st.sets(st.sampled_from("abcdef")), st.data())
def test_updates_are_aggregated_in_the_same_order_whoever_comes_first(
    arrivals: list[str], leaving: set[str], data: st.DataObject
) -> None:
    """Learners answer in any order; some leave first, and come back or not."""
    working, left, held, taken = set(arrivals), set[str](), set[str](), []
    returning = {name for name in sorted(leaving) if data.draw(st.booleans())}

    def take() -> None:
        while True:
            name = next_in_turn(held, working=working, left=left, is_crowded=False, is_late=True)
            if name is None:
                return
            held.remove(name)
            taken.append(name)

    for name in arrivals:
        working.remove(name)
        (left if name in leaving else held).add(name)
        take()
    for name in sorted(returning, reverse=True):
        left.remove(name)
        held.add(name)
        take()
    assert [*taken, *sorted(held)] == sorted(set(arrivals) - leaving | returning)


def test_memory_that_others_wait_for_ends_the_turns_of_those_who_left_and_then_of_all() -> None:
    def first(*, is_crowded: bool, is_late: bool, working: str = "", left: str = "") -> str | None:
        return next_in_turn({"c", "d"}, working=working, left=left, is_crowded=is_crowded, is_late=is_late)

    assert first(left="a", is_crowded=False, is_late=True) is None
    assert first(left="a", is_crowded=True, is_late=False) == "c"
    assert first(left="a", working="b", is_crowded=True, is_late=False) is None
    assert first(left="a", working="b", is_crowded=True, is_late=True) == "c"
    assert first(working="ef", is_crowded=False, is_late=False) == "c"
