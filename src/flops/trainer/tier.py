"""The learners' side of an aggregator: where they join, the rounds with them, what is kept and told of these.

Every aggregator of a tree has one. For an aggregator with clusters below it, a learner is the aggregator of a
cluster, and a round is a cycle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flops.actor import ActorContext, EventLog
from flops.core.project import Round
from flops.core.rounds import Part, has_numbers, terms_for
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError
from flops.trainer.checkpoint import Checkpoint, CheckpointStore
from flops.trainer.disk_patience import PATIENCE_S as DISK_PATIENCE_S
from flops.trainer.disk_patience import when_there_is_space
from flops.trainer.gathering import JOIN_PATIENCE_S, Gathering
from flops.trainer.links import LearnerServer, Link, Loader
from flops.trainer.round_runner import FinishedRound, RoundRunner
from flops.trainer.strategy import RoundStrategy
from flops.wire.services import AggregatorConfig
from flops.wire.training import Array

_log = logging.getLogger(__name__)
_REJOIN_PATIENCE_S = 10.0  # of a restarted aggregator, for learners beyond the needed ones
_PORT_FILE = "port"


class Tier:
    """An aggregator and its learners. Listens from its beginning on; close it at the end.

    Args:
        context: of the service.
        config: what to train.
        events: where progress is told.
        join_patience_s: longest time in which nobody loads and too few have joined for the first round.

    Attributes:
        history: finished rounds, those of earlier starts included once they are restored.
        store: the checkpoints.
        server: where learners are joined.
        terms: what rounds and learners are called here.
    """

    def __init__(
        self,
        context: ActorContext,
        config: AggregatorConfig,
        events: EventLog,
        *,
        join_patience_s: float = JOIN_PATIENCE_S,
    ) -> None:
        self._context = context
        self._config = config
        self._events = events
        self.terms = terms_for(has_clusters=config.has_clusters)
        self._work_dir = Path(context.work_dir)
        self._strategy = RoundStrategy(config.strategy, config.update_precision)
        self.history: list[Round] = []
        self.store = CheckpointStore(self._work_dir / "checkpoint")
        self.server = self._listen()
        self.gathering = Gathering(self.server, config, tell=self.tell, patience_s=join_patience_s)
        self.runner = RoundRunner(
            self.server,
            self._strategy,
            config,
            tell=self.tell,
            on_start=self._tell_round,
            on_failure=self._tell_failure,
        )

    def restore(self) -> Checkpoint | None:
        """Take over where an earlier start stood; None when it had finished no round."""
        checkpoint = self.store.load()
        if checkpoint is not None:
            self.history = list(checkpoint.history)
            self._strategy.restore(checkpoint.strategy_state)
            self._tell_completed(self.history[-1])  # it may have been killed before it had told it
        return checkpoint

    def await_return(self) -> None:
        """After a restart: give all learners the time to dial again; the rounds need fewer."""
        self.server.wait_until(
            lambda: len(self.server.joined()) >= self._config.min_available_clients, _REJOIN_PATIENCE_S
        )

    def run_round(self, number: int, parameters: list[Array], origin: str = "") -> FinishedRound:
        """Run a round, make its result durable, and tell it.

        Args:
            number: of the round.
            parameters: to go out from.
            origin: kept in the checkpoint.

        Raises:
            FlopsError: why there is no result.
        """
        with ThreadPoolExecutor(1, "checkpoint") as writer:  # writes while learners evaluate

            def prepare(aggregated: list[Array]) -> None:
                writer.submit(self.store.prepare, number, aggregated, self._strategy.state())

            finished = self.runner.run(number, parameters, prepare)
        if not finished.evaluated_rows and self._config.parent is None:
            raise _nothing_evaluated(number)
        self.history.append(finished.record)
        when_there_is_space(
            lambda: self.store.save(finished.parameters, self._strategy.state(), self.history, origin),
            f"Saving {self.terms.round.lower()} {number}",
            tell=self.tell,
            patience_s=DISK_PATIENCE_S,
        )
        self._tell_completed(finished.record)
        if not has_numbers(finished.record) and finished.evaluated_rows:
            self.tell(f"{self.terms.round} {number} has no finite accuracy or loss; it cannot be the best.")
        return finished

    def tell(self, message: str) -> None:
        """Tell in one sentence what users should know."""
        self._events.tell("progress", message=message)

    # --- where learners join ---

    def _listen(self) -> LearnerServer:
        """Listen on the port of an earlier start if it is free: the learners dial it."""
        earlier = 0
        with contextlib.suppress(OSError, ValueError):
            earlier = int((self._work_dir / _PORT_FILE).read_text())
        server = self._server_on(earlier) if earlier else None
        server = server or self._server_on(0)
        if server is None:
            raise FlopsError(ErrorCode.PORT_OCCUPIED, f"No port is free on {self._context.host}.")
        write_durably(self._work_dir / _PORT_FILE, str(server.port))
        self._events.tell("listening", address=f"{self._context.host}:{server.port}")
        return server

    def _server_on(self, port: int) -> LearnerServer | None:
        try:
            return LearnerServer(
                self._context.host,
                port,
                self._config.learner_token,
                identity=self._context.identity,
                on_join=self._tell_join,
                on_leave=self._tell_leave,
                on_lost_loader=self._tell_lost_loader,
            )
        except FlopsError as exc:
            _log.warning("%s", exc)
            return None

    # --- events ---

    def _tell_round(self, number: int, learners: Sequence[str]) -> None:
        self._events.tell("round_started", round=number, rounds=self._config.rounds, learners=list(learners))

    def _tell_completed(self, record: Round) -> None:
        self._events.tell(
            "round_completed", rounds=self._config.rounds, record=record.model_dump(mode="json")
        )

    def _tell_failure(self, number: int, phase: str, part: Part) -> None:
        self._events.tell(
            "learner_failed",
            learner=part.learner,
            node=part.node,
            round=number,
            phase=phase,
            error=part.error,
        )

    def _tell_join(self, link: Link) -> None:
        self._events.tell("learner_joined", learner=link.learner, node=link.node, rows=link.rows)

    def _tell_leave(self, link: Link, reason: str) -> None:
        self._events.tell("learner_left", learner=link.learner, node=link.node, reason=reason)

    def _tell_lost_loader(self, loader: Loader) -> None:
        self.tell(f"{loader.learner} on {loader.node} has gone while it loaded its code and data.")


def _nothing_evaluated(number: int) -> FlopsError:
    return FlopsError(
        ErrorCode.ROUND_FAILED,
        f"Round {number}: no learner evaluated a single row.",
        hint="evaluate_model() must return the number of held-out rows; keep some out of the training.",
        details={"round": number},
    )
