"""One round of a training: ask the learners to train, aggregate, have the result evaluated."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message as FlowerMessage

from flops.core.project import Participant, Round
from flops.core.rounds import (
    Outcome,
    Part,
    Verdict,
    describe_part,
    failure_of,
    judge,
    next_in_turn,
    terms_for,
)
from flops.errors import ErrorCode
from flops.trainer.grid import ROWS, Answer, Asked, FlightGrid, reply_with
from flops.trainer.links import LearnerServer, Link
from flops.trainer.strategy import RoundStrategy
from flops.wire.services import AggregatorConfig
from flops.wire.training import EVALUATE, TRAIN, Array, Message

_Told = dict[str, tuple[str, dict[str, Any]]]  # by learner: its node, and the header of its answer


@dataclass(frozen=True)
class FinishedRound:
    """A round's result: the new global parameters, and the numbers of their evaluation."""

    parameters: list[Array]
    record: Round
    evaluated_rows: int  # held-out rows of all learners


@dataclass(frozen=True)
class Evaluation:
    """What learners found of parameters: means over their held-out rows."""

    told: dict[str, tuple[str, dict[str, Any]]]  # by learner: its node, and the header of its answer
    metrics: dict[str, float]
    rows: int  # held-out rows of all learners; 0 when there was none, and no metric


@dataclass
class _Phase:
    """What came of one phase so far, by learner."""

    name: str
    number: int
    needed: int
    deadline_s: float  # all by the monotonic clock
    turns_end_s: float  # until then, updates are aggregated in the same order whoever comes first
    parts: dict[str, Part] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)  # usable ones
    held: set[str] = field(default_factory=set)  # whose updates are not taken yet

    @property
    def lacks_answers(self) -> bool:
        """Whether more learners have to answer."""
        return len(self.answers) < self.needed

    def may_ask(self, link: Link) -> bool:
        """Whether a learner is still to be asked: what fails by its code would fail again."""
        part = self.parts.get(link.learner)
        return part is None or part.outcome.may_recover


class RoundRunner:
    """Runs rounds with the learners that are joined.

    Args:
        server: where learners are joined.
        strategy: how results are aggregated.
        config: how many learners are needed, and how long is waited for them in each of the two phases.
        tell: is told in one sentence what users should know, such as who was left out.
        on_start: is told the round and who takes part.
        on_failure: is told at once the round, the phase, and a learner's part that it answered with an error.
    """

    def __init__(
        self,
        server: LearnerServer,
        strategy: RoundStrategy,
        config: AggregatorConfig,
        *,
        tell: Callable[[str], None],
        on_start: Callable[[int, Sequence[str]], None],
        on_failure: Callable[[int, str, Part], None],
    ) -> None:
        self._server = server
        self._grid = FlightGrid(server)
        self._strategy = strategy
        self._config = config
        self._terms = terms_for(has_clusters=config.has_clusters)
        self._tell = tell
        self._on_start = on_start
        self._on_failure = on_failure

    def run(
        self,
        number: int,
        parameters: list[Array],
        on_aggregated: Callable[[list[Array]], None] = lambda _: None,
    ) -> FinishedRound:
        """Run a round from these global parameters.

        Args:
            number: of the round.
            parameters: to go out from.
            on_aggregated: is given the new ones before they are evaluated.

        Raises:
            FlopsError: ``user_code_failed``, ``too_few_learners``, ``round_failed``, ``aggregation_failed``.
        """
        started = time.monotonic()
        self._on_start(number, [link.learner for link in self._server.idle()])
        aggregated, trained, left_out = self._train(number, parameters)
        on_aggregated(aggregated)
        evaluation = self.evaluate(number, aggregated)
        metrics = dict(evaluation.metrics)
        record = Round(
            number=number,
            accuracy=metrics.pop("accuracy", None),
            loss=metrics.pop("loss", None),
            metrics=metrics,
            participants=_participants(trained, evaluation.told),
            left_out=left_out,
            duration_s=time.monotonic() - started,
        )
        return FinishedRound(aggregated, record, evaluation.rows)

    def evaluate(self, number: int, parameters: list[Array]) -> Evaluation:
        """Have parameters evaluated on all learners' held-out rows.

        Raises:
            FlopsError: ``user_code_failed``, ``too_few_learners``, ``round_failed``, ``aggregation_failed``.
        """
        phase = self._collect(
            self._phase(EVALUATE, number, self._config.min_evaluate_clients),
            lambda: self._strategy.configure_evaluate(number, parameters, self._grid),
            lambda _: None,
        )
        replies, rows = _evaluate_replies(phase)
        metrics = self._strategy.aggregate_evaluate(number, replies) if replies else {}
        return Evaluation(_told_by(phase), metrics, rows)

    def _train(self, number: int, parameters: list[Array]) -> tuple[list[Array], _Told, tuple[str, ...]]:
        """The new parameters, what their learners told, and who was left out; all else is freed here."""
        self._strategy.begin(parameters)
        phase = self._collect(
            self._phase(TRAIN, number, self._config.min_fit_clients),
            lambda: self._strategy.configure_train(number, parameters, self._grid),
            lambda reply: self._problem_of(reply, parameters),
        )
        for learner in sorted(phase.held):  # of those that were waited for, nobody comes any more
            self._take(phase, learner)
        aggregated = self._strategy.aggregate_train(number)
        return aggregated, _told_by(phase), tuple(sorted(set(phase.parts) - set(phase.answers)))

    def _problem_of(self, reply: Message, parameters: Sequence[Array]) -> str | None:
        """Why a learner's training result cannot be aggregated; None when it can."""
        if int(reply.header["rows"]) <= 0:
            return "it trained on no row"
        return self._strategy.problem_with(reply.arrays, parameters)

    def _phase(self, name: str, number: int, needed: int) -> _Phase:
        now_s, limit_s = time.monotonic(), self._config.round_timeout_s
        return _Phase(name, number, needed, now_s + limit_s, now_s + limit_s / 2)

    def _collect(
        self,
        phase: _Phase,
        messages: Callable[[], list[FlowerMessage]],
        problem: Callable[[Message], str | None],
    ) -> _Phase:
        """Ask, and ask those that come back or join, until enough have answered or waiting cannot help."""
        asked: list[Asked] = []
        while True:
            asked += self._ask_idle(phase, asked, messages)
            self._await_news(phase, asked)
            is_late = time.monotonic() >= phase.deadline_s
            settled = [one for one in asked if is_late or one.request.is_settled]
            asked = [one for one in asked if one not in settled]
            for one in settled:
                self._classify(phase, self._grid.answer(one), problem)
            self._take_in_turn(phase, asked)
            parts = list(phase.parts.values())
            verdict = self._judge(phase, asked)
            if verdict is Verdict.GO_ON:
                self._report_left_out(phase)
                return phase
            if verdict is Verdict.FAIL or is_late:
                waited_s = self._config.round_timeout_s
                raise failure_of(
                    phase.name, phase.number, parts, needed=phase.needed, waited_s=waited_s, terms=self._terms
                )

    def _ask_idle(
        self, phase: _Phase, asked: Sequence[Asked], messages: Callable[[], list[FlowerMessage]]
    ) -> list[Asked]:
        links = self._to_ask(phase, asked)
        if not links:
            return []
        self._grid.show(links)
        return self._grid.send(messages())

    def _to_ask(self, phase: _Phase, asked: Sequence[Asked]) -> list[Link]:
        """Who is to be asked, while too few are done: later on, who comes waits for the next round.

        A learner is idle as soon as it has answered; as long as its answer is not taken, it is asked already.
        """
        if not phase.lacks_answers:
            return []
        links = [one.request.link for one in asked]
        return [link for link in self._server.idle() if link not in links and phase.may_ask(link)]

    def _await_news(self, phase: _Phase, asked: Sequence[Asked]) -> None:
        """Wait until a learner has answered or left, one can be asked, or an update is next in turn."""

        def is_there_news() -> bool:
            return (
                any(one.request.is_settled for one in asked)
                or bool(self._to_ask(phase, asked))
                or self._next_in_turn(phase, asked) is not None
            )

        for until_s in (phase.turns_end_s, phase.deadline_s):
            if self._server.wait_until(is_there_news, max(0.0, until_s - time.monotonic())):
                return

    def _next_in_turn(self, phase: _Phase, asked: Sequence[Asked]) -> str | None:
        return next_in_turn(
            phase.held,
            working={one.request.link.learner for one in asked},
            left={learner for learner, part in phase.parts.items() if part.outcome.may_recover},
            is_crowded=self._server.is_crowded(),
            is_late=time.monotonic() >= phase.turns_end_s,
        )

    def _take_in_turn(self, phase: _Phase, asked: Sequence[Asked]) -> None:
        while (learner := self._next_in_turn(phase, asked)) is not None:
            self._take(phase, learner)

    def _take(self, phase: _Phase, learner: str) -> None:
        """Have the strategy take in a learner's update, which is freed if the strategy does not need it."""
        answer = phase.answers[learner]
        update = _reply_of(answer)
        self._strategy.take(answer.instruction, update)
        update.arrays.clear()
        phase.held.remove(learner)
        self._server.free(learner)

    def _judge(self, phase: _Phase, asked: Sequence[Asked]) -> Verdict:
        away = self._server.away() - set(phase.parts)
        working = {one.request.link.learner for one in asked}
        # A learner that left and is asked again counts as working, not as one that may recover.
        parts = [part for part in phase.parts.values() if part.learner not in working]
        return judge(parts, needed=phase.needed, working=len(working), away=len(away))

    def _classify(self, phase: _Phase, answer: Answer, problem: Callable[[Message], str | None]) -> None:
        error: dict[str, Any] | None = None
        if answer.reply is None:
            outcome = Outcome.LEFT if answer.reason else Outcome.LATE
            reason = answer.reason
        elif answer.reply.header.get("error"):
            error = dict(answer.reply.header["error"])
            is_users = error.get("code") == ErrorCode.USER_CODE_FAILED
            outcome = Outcome.USER_CODE if is_users else Outcome.REFUSED
            reason = str(error.get("message", ""))
        else:
            reason = problem(answer.reply) or ""
            outcome = Outcome.REFUSED if reason else Outcome.DONE
        part = Part(learner=answer.learner, node=answer.node, outcome=outcome, reason=reason, error=error)
        phase.parts[answer.learner] = part
        if error is not None:
            self._on_failure(phase.number, phase.name, part)
        if outcome is Outcome.DONE:
            phase.answers[answer.learner] = answer
            if phase.name == TRAIN:
                phase.held.add(answer.learner)
        if outcome is not Outcome.DONE or not self._strategy.is_folding:
            self._server.free(answer.learner)  # no other answer gets room by waiting for this one's turn

    def _report_left_out(self, phase: _Phase) -> None:
        for part in phase.parts.values():
            if part.outcome is not Outcome.DONE:
                where = f"{self._terms.round} {phase.number}, {phase.name}"
                self._tell(f"{where}: without {part.learner}, {describe_part(part)}.")


def _told_by(phase: _Phase) -> _Told:
    return {name: (answer.node, _reply_of(answer).header) for name, answer in phase.answers.items()}


def _evaluate_replies(phase: _Phase) -> tuple[list[FlowerMessage], int]:
    """Replies with the numbers that all learners with held-out rows have: means need them from each.

    Beside them all their rows.
    """
    answers = [phase.answers[name] for name in sorted(phase.answers)]
    answers = [answer for answer in answers if int(_reply_of(answer).header["rows"]) > 0]
    if not answers:
        return [], 0
    numbers = [_reply_of(answer).header["metrics"] for answer in answers]
    shared = [key for key in numbers[0] if all(other.get(key) is not None for other in numbers)]
    rows = [int(_reply_of(answer).header["rows"]) for answer in answers]
    replies = [
        reply_with(answer.instruction, None, {ROWS: count, **{key: float(own[key]) for key in shared}})
        for answer, own, count in zip(answers, numbers, rows, strict=True)
    ]
    return replies, sum(rows)


def _participants(trained: _Told, evaluated: _Told) -> tuple[Participant, ...]:
    found = []
    for learner in sorted({*trained, *evaluated}):
        node, fit = trained.get(learner, ("", {}))
        other, evaluation = evaluated.get(learner, ("", {}))
        numbers = evaluation.get("metrics", {})
        found.append(
            Participant(
                learner=learner,
                node=node or other,
                rows=int(fit.get("rows", 0)),
                fit_s=float(fit.get("seconds", 0.0)),
                evaluate_s=float(evaluation.get("seconds", 0.0)),
                accuracy=numbers.get("accuracy"),
                loss=numbers.get("loss"),
                cluster=str(fit.get("cluster") or evaluation.get("cluster") or ""),
                rounds=tuple(Round.model_validate(record) for record in fit.get("rounds", ())),
            )
        )
    return tuple(found)


def _reply_of(answer: Answer) -> Message:
    if answer.reply is None:
        raise AssertionError(f"{answer.learner} has not answered")
    return answer.reply
