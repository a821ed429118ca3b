"""How fast nodes are, told by rounds."""

from __future__ import annotations

import pytest

from flops.core.node_paces import NodePaces, pace_step
from flops.core.project import Participant, Round


def part(node: str, rows: int, fit_s: float, **fields: object) -> Participant:
    return Participant.model_validate(
        {"learner": f"learner-{node}", "node": node, "rows": rows, "fit_s": fit_s, **fields}
    )


def paces_of(*rounds: Round) -> dict[str, float]:
    paces = NodePaces()
    for record in rounds:
        paces.take_in(record)
    return paces.all()


def test_nodes_are_compared_by_their_seconds_for_a_row_within_a_round() -> None:
    first = Round(number=1, participants=(part("a", 100, 1), part("b", 200, 2), part("c", 100, 4)))
    assert paces_of(first) == pytest.approx({"a": 1.0, "b": 1.0, "c": 4.0})
    heavier = Round(number=1, participants=(part("a", 100, 100), part("b", 100, 100), part("c", 100, 400)))
    assert paces_of(first, heavier) == pytest.approx({"a": 1.0, "b": 1.0, "c": 4.0})


def test_a_later_round_counts_but_does_not_decide_alone() -> None:
    even = Round(number=1, participants=(part("a", 10, 1), part("b", 10, 1), part("c", 10, 1)))
    hiccup = Round(number=2, participants=(part("a", 10, 1), part("b", 10, 1), part("c", 10, 8)))
    once = paces_of(even, hiccup)["c"]
    assert 1.5 < once < 2
    assert paces_of(even, *[hiccup] * 20)["c"] == pytest.approx(8, rel=0.05)


def test_learners_on_one_node_count_as_one() -> None:
    record = Round(number=1, participants=(part("a", 10, 1), part("a", 10, 3), part("b", 10, 2)))
    assert paces_of(record) == pytest.approx({"a": 1.0, "b": 1.0})


def test_what_cannot_be_compared_tells_nothing() -> None:
    alone = Round(number=1, participants=(part("a", 10, 1),))
    short = Round(number=1, participants=(part("a", 10, 1), part("b", 1_000, 0.01)))
    no_rows = Round(number=1, participants=(part("a", 10, 1), part("b", 0, 3)))
    assert paces_of(alone, short, no_rows) == {}


def test_of_a_cycle_the_rounds_of_its_clusters_count() -> None:
    own = Round(number=1, participants=(part("a", 10, 1), part("b", 10, 2)))
    cycle = Round(
        number=1,
        participants=(
            part("host-of-east", 20, 9, cluster="east", rounds=(own,)),
            part("host-of-west", 20, 1, cluster="west"),
        ),
    )
    assert paces_of(cycle) == pytest.approx({"a": 2 / 3, "b": 4 / 3})


def test_small_differences_do_not_count() -> None:
    paces = {"quick": 0.4, "usual": 1.1, "slow": 2.0}
    assert [pace_step(paces, name) for name in ("quick", "usual", "unknown", "slow")] == [-3, 0, 0, 2]
