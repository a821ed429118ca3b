"""How fast nodes train, measured in earlier rounds: how long each takes for a row, beside the others."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping

from flops.core.project import Round

LEAST_FIT_S = 0.1  # shorter fits tell how long it takes to begin, not how fast rows are
_WEIGHT = 0.3  # of the latest round; a node may have become slower, or faster
_STEPS_PER_DOUBLING = 2  # nodes whose paces differ by less count as equally fast


class NodePaces:
    """The paces of nodes by name: 1 for a node as fast as the others, 2 for one that takes twice as long.

    Models and data differ from project to project, so nodes are compared within a round only. What rounds of
    one learner tell is nothing; a node that was never compared has no pace. Not thread-safe.
    """

    def __init__(self) -> None:
        self._logarithms: dict[str, float] = {}

    def take_in(self, record: Round) -> None:
        """Learn from a finished round, of a cycle from its clusters' rounds."""
        for part in record.participants:
            for own in part.rounds:
                self.take_in(own)
        measured: dict[str, list[float]] = defaultdict(list)
        for part in record.participants:
            if part.rows > 0 and part.fit_s >= LEAST_FIT_S and not part.cluster:
                measured[part.node].append(part.fit_s / part.rows)
        if len(measured) < 2:
            return
        means = {node: statistics.fmean(values) for node, values in measured.items()}
        usual = statistics.median(means.values())
        for node, mean in means.items():
            latest = math.log2(mean / usual)
            before = self._logarithms.get(node, latest)
            self._logarithms[node] = before + _WEIGHT * (latest - before)

    def all(self) -> dict[str, float]:
        """The paces that are known."""
        return {node: 2**logarithm for node, logarithm in self._logarithms.items()}


def pace_step(paces: Mapping[str, float], node: str) -> int:
    """A node's pace in steps that noise does not decide; lower is faster, 0 for as usual or not known."""
    return round(_STEPS_PER_DOUBLING * math.log2(paces.get(node, 1.0)))
