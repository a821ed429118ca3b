"""Before the first round: who has joined, who loads, who will not come, and when to begin or to give up."""

from __future__ import annotations

import time
from collections.abc import Callable

from flops.core.rounds import terms_for
from flops.errors import ErrorCode, FlopsError
from flops.trainer.links import LearnerServer, Loader
from flops.trainer.loading import GRACE_S
from flops.wire.services import AggregatorConfig

JOIN_PATIENCE_S = 1_800.0  # environments of learners are built meanwhile
_MAY_PASS = frozenset({ErrorCode.UNREACHABLE, ErrorCode.TIMEOUT})  # a learner is started anew after these
_GRACE_S = GRACE_S / 2  # after a learner should have told of its end, before it is ended without a word
_LOOK_S = 0.5  # how often deadlines are looked at


class Gathering:
    """Waits for the learners of the first round.

    All learners are waited for. One that loads beyond its deadline is given up: the training begins without
    it when enough others are there for a round. So is a whole cluster, whatever keeps it from joining.

    Args:
        server: where they join.
        config: how many are needed, and how long each may load without a new row.
        tell: is told in one sentence what users should know.
        patience_s: longest time in which nobody loads and too few have joined.
    """

    def __init__(
        self,
        server: LearnerServer,
        config: AggregatorConfig,
        *,
        tell: Callable[[str], None],
        patience_s: float = JOIN_PATIENCE_S,
    ) -> None:
        self._server = server
        self._config = config
        self._tell = tell
        self._patience_s = max(patience_s, config.round_timeout_s)
        self._terms = terms_for(has_clusters=config.has_clusters)
        self._stuck: dict[str, tuple[str, str]] = {}  # by learner: its node, and how it stands

    def wait(self, is_pointless: Callable[[], bool]) -> None:
        """Wait until the first round can begin, or until it is pointless.

        Raises:
            FlopsError: ``too_few_learners``; what keeps a learner from loading its code or data for good.
        """
        wanted = self._config.min_available_clients
        noun = self._terms.learner
        self._tell(f"Waiting for {wanted} {noun}{'s' if wanted > 1 else ''} to join.")
        deadline_s = time.monotonic() + self._patience_s
        while not is_pointless():
            self._find_stuck()
            if self._is_complete():
                return
            if not self._config.has_clusters:
                self._raise_fatal()
            if wanted - len(self._stuck) < self._least:
                self._raise_fatal()
                raise self._too_few(f"{self._least} {noun}s are needed for a {self._terms.round.lower()}")
            if self._server.loaders():
                deadline_s = max(deadline_s, time.monotonic() + self._config.load_timeout_s)
            elif time.monotonic() > deadline_s:
                if self._config.has_clusters and len(self._server.joined()) >= self._least:
                    self._tell(
                        f"Beginning without the {noun}s that have not joined in {self._patience_s:g} s."
                    )
                    return
                what = f"{wanted} {noun}s are needed to begin"
                raise self._too_few(f"{what}; joined within {self._patience_s:g} s: {self._joined()}")
            self._server.wait_until(lambda: is_pointless() or self._is_complete(), _LOOK_S)

    @property
    def _least(self) -> int:
        return max(self._config.min_fit_clients, self._config.min_evaluate_clients)

    def _is_complete(self) -> bool:
        wanted = self._config.min_available_clients - len(self._stuck)
        return len(self._server.joined()) >= max(wanted, self._least)

    def _find_stuck(self) -> None:
        """Look for learners that do not load any more; one that joins after all is as good as any."""
        for link in self._server.joined():
            self._stuck.pop(link.learner, None)
        for learner, (node, error) in self._server.refusals().items():
            if error.code is ErrorCode.TIMEOUT or self._config.has_clusters:
                self._give_up(learner, node, error.message)
        for loader in self._server.loaders():
            limit_s = self._config.load_timeout_s
            if time.monotonic() - loader.progressed_s > limit_s + _GRACE_S:
                self._give_up(
                    loader.learner, loader.node, f"It has loaded for {limit_s:g} s without a new row."
                )

    def _give_up(self, learner: str, node: str, why: str) -> None:
        if learner not in self._stuck:
            self._stuck[learner] = node, why
            what = f"The cluster of {learner}" if self._config.has_clusters else learner
            self._tell(f"{what} on {node} is not waited for any longer: {why}")

    def _raise_fatal(self) -> None:
        for learner, (node, error) in self._server.refusals().items():
            if error.code not in _MAY_PASS:
                error.details.update(learner=learner, node=node)
                raise error

    def _too_few(self, what: str) -> FlopsError:
        standings = {link.learner: f"joined on {link.node}" for link in self._server.joined()}
        standings |= {loader.learner: _describe(loader) for loader in self._server.loaders()}
        refusals = self._server.refusals()
        standings |= {learner: error.message for learner, (_, error) in refusals.items()}
        standings |= {learner: why for learner, (_, why) in self._stuck.items()}
        told = "; ".join(
            f"{learner}: {standing.rstrip('.')}" for learner, standing in sorted(standings.items())
        )
        details = {"learners": standings}
        tracebacks = [
            error.details["traceback"] for _, error in refusals.values() if "traceback" in error.details
        ]
        return FlopsError(
            ErrorCode.TOO_FEW_LEARNERS,
            f"{what}{f' ({told})' if told else ''}.",
            details={**details, **({"traceback": tracebacks[0]} if tracebacks else {})},
        )

    def _joined(self) -> str:
        return ", ".join(link.learner for link in self._server.joined()) or "none"


def _describe(loader: Loader) -> str:
    still_s = time.monotonic() - loader.progressed_s
    return f"loads on {loader.node}, {loader.rows:,} rows so far, for {still_s:.0f} s without a new one"
