"""What holds for every choice of what to give up, whatever is kept and however little may be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flops.core.retention import Entry, Limits, bytes_allowed, choose_victims, keep_order

NOW_S = 1_000.0
ENTRIES = st.lists(
    st.builds(
        Entry,
        key=st.text("abcdef", min_size=1, max_size=3),
        used_at_s=st.integers(0, 1_000).map(float),
        size_bytes=st.integers(0, 100),
        is_in_use=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda entry: entry.key,
)
LIMITS = st.builds(
    Limits,
    max_bytes=st.none() | st.integers(0, 600),
    max_count=st.none() | st.integers(0, 12),
    max_age_s=st.none() | st.integers(0, 1_000).map(float),
)


def is_within(entries: list[Entry], limits: Limits) -> bool:
    return (
        (limits.max_bytes is None or sum(e.size_bytes for e in entries) <= limits.max_bytes)
        and (limits.max_count is None or len(entries) <= limits.max_count)
        and all(
            entry.is_in_use or limits.max_age_s is None or NOW_S - entry.used_at_s <= limits.max_age_s
            for entry in entries
        )
    )


@given(entries=ENTRIES, limits=LIMITS)
@settings(max_examples=500, deadline=None)
def test_the_least_recently_used_go_and_no_more_than_needed(entries: list[Entry], limits: Limits) -> None:
    victims = choose_victims(entries, limits, NOW_S)
    kept = [entry for entry in entries if entry not in victims]
    free = [entry for entry in kept if not entry.is_in_use]

    assert not any(victim.is_in_use for victim in victims)
    assert is_within(kept, limits) or not free
    assert all(victim.used_at_s <= entry.used_at_s for victim in victims for entry in free)
    if victims:  # without its last choice it was too much
        assert not is_within([*kept, victims[-1]], limits)
    assert choose_victims(kept, limits, NOW_S) == []
    assert victims == list(reversed(keep_order(victims)))


@given(entries=ENTRIES)
def test_without_limits_everything_stays(entries: list[Entry]) -> None:
    assert choose_victims(entries, Limits(), NOW_S) == []


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_what_is_allowed_leaves_the_wanted_space(limit: int, kept: int, free: int, wanted: int) -> None:
    allowed = bytes_allowed(limit, kept=kept, free=free, wanted_free=wanted)
    assert 0 <= allowed <= limit
    given_back = max(0, kept - allowed)
    assert free + given_back >= wanted or allowed == 0
    if free >= wanted:
        assert allowed >= min(limit, kept)
