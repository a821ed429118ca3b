"""Rules of a training's rounds: what a round needs, why it fails, which round is best, when to end early."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from typing import Any

from flops.core.model import Value
from flops.core.project import Round
from flops.core.sla import EarlyStopping, TargetMetric
from flops.errors import ErrorCode, FlopsError


class Terms(Value):
    """What an aggregator calls its rounds, and those who take part in them."""

    round: str = "Round"
    learner: str = "learner"


_CYCLES = Terms(round="Cycle", learner="cluster")


def terms_for(*, has_clusters: bool) -> Terms:
    """What an aggregator calls its rounds; its learners may be the aggregators of clusters."""
    return _CYCLES if has_clusters else Terms()


class Outcome(StrEnum):
    """What became of one learner's part in a round."""

    DONE = "done"
    USER_CODE = "user_code"  # the repository's code raised
    REFUSED = "refused"  # it answered something that cannot be used
    LEFT = "left"  # its connection ended
    LATE = "late"  # it had not answered when the time was up

    @property
    def may_recover(self) -> bool:
        """Whether asking again, when the learner is back, can go better."""
        return self in {Outcome.LEFT, Outcome.LATE}


class Part(Value):
    """One learner's part in one phase of a round."""

    learner: str
    node: str
    outcome: Outcome
    reason: str = ""
    error: dict[str, Any] | None = None  # `FlopsError.to_dict()`


class Verdict(StrEnum):
    """What to do with a phase of a round."""

    GO_ON = "go_on"  # enough learners are done, and nobody works on it any more
    WAIT = "wait"  # learners are at work, lost ones may come back, others may join
    FAIL = "fail"  # waiting cannot help


def judge(parts: Iterable[Part], *, needed: int, working: int = 0, away: int = 0) -> Verdict:
    """Decide about a phase whenever a learner has answered or is gone.

    Args:
        parts: the latest part of each learner that has answered or is gone.
        needed: how many must be done.
        working: how many are asked and have not answered yet.
        away: how many others may come back and be asked.
    """
    outcomes = [part.outcome for part in parts]
    if outcomes.count(Outcome.DONE) >= needed:
        return Verdict.WAIT if working else Verdict.GO_ON
    if any(outcome in {Outcome.USER_CODE, Outcome.REFUSED} for outcome in outcomes):
        usable = sum(outcome is Outcome.DONE or outcome.may_recover for outcome in outcomes)
        if usable + working + away < needed:
            return Verdict.FAIL
    return Verdict.WAIT


def next_in_turn(
    held: Collection[str], *, working: Collection[str], left: Collection[str], is_crowded: bool, is_late: bool
) -> str | None:
    """Whose update is aggregated next, for the same order whoever comes first; None while that may change.

    Args:
        held: learners whose updates are there.
        working: learners that have not answered yet.
        left: learners that are gone, and may come back.
        is_crowded: whether others wait for memory that the held updates take. Then those that left lose their
            turn: nobody waits for somebody who may never come.
        is_late: whether so much of the round's time has passed that those at work lose it then, too.
    """
    if not held:
        return None
    first = min(held)
    awaited = {*working, *left}
    if is_crowded:
        awaited = set() if is_late else set(working)
    return first if all(first < learner for learner in awaited) else None


def failure_of(
    phase: str,
    number: int,
    parts: Sequence[Part],
    *,
    needed: int,
    waited_s: float,
    terms: Terms = Terms(),
) -> FlopsError:
    """The error of a phase that failed: the user's own error when there is one, else what each one did.

    Args:
        phase: ``train`` or ``evaluate``.
        number: the round.
        parts: the latest part of each learner that was asked.
        needed: how many had to be done.
        waited_s: how long was waited for the missing ones.
        terms: what rounds and learners are called.
    """
    done = sum(part.outcome is Outcome.DONE for part in parts)
    reasons = {part.learner: describe_part(part) for part in parts}
    details: dict[str, Any] = {"round": number, "phase": phase, "learners": reasons}
    for part in parts:
        if part.outcome is Outcome.USER_CODE and part.error is not None:
            error = FlopsError.from_dict(part.error)
            error.details.update(details | {"node": part.node, "learner": part.learner})
            return FlopsError(
                error.code,
                f"{terms.round} {number}, {phase}: {error.message}",
                hint=error.hint,
                details=error.details,
            )
    told = (
        "; ".join(f"{learner}: {reason}" for learner, reason in reasons.items())
        or f"no {terms.learner} is joined"
    )
    if parts and all(part.outcome in {Outcome.REFUSED, Outcome.DONE} for part in parts):
        code, wait = ErrorCode.ROUND_FAILED, ""
    elif any(part.outcome is Outcome.LATE for part in parts):
        code, wait = ErrorCode.ROUND_FAILED, f" within {waited_s:g} s"
    else:
        code, wait = ErrorCode.TOO_FEW_LEARNERS, f" within {waited_s:g} s"
    return FlopsError(
        code,
        f"{terms.round} {number}, {phase}: {done} of the {needed} needed {terms.learner}s answered "
        f"usably{wait} ({told}).",
        details=details,
    )


def describe_part(part: Part) -> str:
    """One learner's part in words, with its node."""
    words = {
        Outcome.DONE: "done",
        Outcome.USER_CODE: "its code failed",
        Outcome.REFUSED: "its answer is unusable",
        Outcome.LEFT: "it left",
        Outcome.LATE: "it did not answer in time",
    }[part.outcome]
    return f"{words} on {part.node}{f' ({part.reason})' if part.reason else ''}"


def best_round(history: Iterable[Round]) -> Round | None:
    """The best round: higher accuracy; then, and without accuracy, lower loss; then the earlier one.

    A round without a finite number is never the best; None when there is no other.
    """
    best: Round | None = None
    for candidate in history:
        if has_numbers(candidate) and (best is None or _rank(candidate) > _rank(best)):
            best = candidate
    return best


def has_numbers(record: Round) -> bool:
    """Whether a round can be compared with others: it has a finite accuracy or loss."""
    return _finite(record.accuracy) is not None or _finite(record.loss) is not None


def _rank(record: Round) -> tuple[float, float]:
    accuracy, loss = _finite(record.accuracy), _finite(record.loss)
    return (-math.inf if accuracy is None else accuracy, -math.inf if loss is None else -loss)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def reason_to_end(
    history: Sequence[Round], target: TargetMetric | None, early: EarlyStopping | None
) -> str | None:
    """Why the training ends before its last round, in one sentence; None when it goes on."""
    if not history:
        return None
    last = history[-1]
    if target is not None:
        value = _finite(last.accuracy if target.name == "accuracy" else last.loss)
        is_reached = value is not None and (
            value >= target.value if target.name == "accuracy" else value <= target.value
        )
        if is_reached:
            return f"Round {last.number} reached the target: {target.name} {value:.4f} for {target.value:g}."
    if early is not None and _rounds_without_gain(history, early.min_delta) >= early.patience:
        return f"The last {early.patience} rounds brought no gain above {early.min_delta:g}."
    return None


def _rounds_without_gain(history: Sequence[Round], min_delta: float) -> int:
    """Rounds since the metric last improved by more than `min_delta`."""
    has_accuracy = any(_finite(record.accuracy) is not None for record in history)
    best = -math.inf
    since = 0
    for record in history:
        raw = _finite(record.accuracy if has_accuracy else record.loss)
        value = -math.inf if raw is None else raw if has_accuracy else -raw
        if value > best + min_delta:
            best, since = value, 0
        else:
            since += 1
    return since
