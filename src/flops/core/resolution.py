"""Rules for requirements that cannot be met together: which one to loosen, how far, and what to tell."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from flops.core.requirements import name_of

_MAX_ATTEMPTS = 12
_MAX_ESSENCE = 700
_LOCKED = re.compile(
    r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?==(?P<version>[^\s;\\]+)", re.MULTILINE
)
_NOISE = re.compile(r"^(error|cause|hint|warning):\s*|^[×╰─▶├│\s]+", re.IGNORECASE)
_REMEDIES = (  # the first that fits: what is missing explains what then contradicts
    (
        re.compile(r"was not found in the|not found in the package registry"),
        "Correct the name: a package may be called otherwise than its module, as scikit-learn is.",
    ),
    (
        re.compile(r"Wheels are available for `[^`]+` \([^)]+\) on the following platform"),
        "Name a version or a package that has wheels for the platform of these nodes, or sources.",
    ),
    (
        re.compile(r"but we only found wheels for"),
        "Name a version that has wheels for this Python, or another Python in the dependency file.",
    ),
    (
        re.compile(r"there is no version of"),
        "Name a version that the package index has, or a range of versions.",
    ),
)
_KEPT_OPERATORS = frozenset({">=", ">", "!="})
_EXACT_OPERATORS = frozenset({"==", "~=", "==="})


class UnsolvableError(Exception):
    """The resolver proved that requirements cannot be met together; the text is its explanation."""


@dataclass(frozen=True)
class Problem:
    """What a lock must satisfy.

    Args:
        own: the user's requirements.
        needed: the platform's requirements.
        pins: normalised name → version of what another lock has; kept where possible.
    """

    own: tuple[str, ...]
    needed: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)

    @property
    def own_names(self) -> list[str]:
        """Normalised names of the user's requirements."""
        return [name_of(text) for text in self.own]

    def without_pins(self, names: Iterable[str]) -> Problem:
        """The same without some pins."""
        gone = set(names)
        return replace(self, pins={n: version for n, version in self.pins.items() if n not in gone})

    def loosened(self, name: str, *, is_bound_kept: bool) -> Problem | None:
        """The same with a looser requirement of the user's; None when there is nothing to loosen."""
        own = tuple(
            (relax(text, is_bound_kept=is_bound_kept) or text) if name_of(text) == name else text
            for text in self.own
        )
        return None if own == self.own else replace(self.without_pins([name]), own=own)


@dataclass(frozen=True)
class Solution:
    """A lock, the user's requirements as they were met, and what had to be given up for it."""

    lock: str
    own: tuple[str, ...]
    notes: tuple[str, ...] = ()


def solve(problem: Problem, attempt: Callable[[Problem], str]) -> Solution:
    """Find a lock, giving up as little as possible.

    First go pins that nobody asked for, then the upper bound of one requirement of the user's, then of
    another; only those that the resolver names.

    Args:
        problem: what to satisfy.
        attempt: the resolver; raises `UnsolvableError`.

    Raises:
        UnsolvableError: when nothing that may be given up helps.
    """
    reason = ""
    tried = problem
    for _ in range(_MAX_ATTEMPTS):
        try:
            lock = attempt(tried)
        except UnsolvableError as exc:
            reason = reason or str(exc)
            tried = _give_up_something(tried, attempt, exc)
        else:
            return Solution(lock, tried.own, _notes(problem, tried, lock, reason))
    raise UnsolvableError(reason)


def _give_up_something(
    problem: Problem, attempt: Callable[[Problem], str], unsolvable: UnsolvableError
) -> Problem:
    explanation = str(unsolvable)
    own = problem.own_names
    if unasked := [name for name in mentioned(explanation, problem.pins) if name not in own]:
        return problem.without_pins(unasked)
    candidates = [
        looser
        for is_bound_kept in (True, False)
        for name in mentioned(explanation, own)
        if (looser := problem.loosened(name, is_bound_kept=is_bound_kept)) is not None
    ]
    for candidate in candidates:
        try:
            attempt(candidate)
        except UnsolvableError:
            continue
        return candidate
    if not candidates:
        raise unsolvable
    return candidates[0]


def _notes(asked: Problem, met: Problem, lock: str, reason: str) -> tuple[str, ...]:
    versions = locked_versions(lock)
    notes = [
        f"{before} was loosened, "
        f"the environment has {versions.get(name_of(before), after)}: {essence(reason)}"
        for before, after in zip(asked.own, met.own, strict=True)
        if before != after
    ]
    changed = [
        f"{name} {versions[name]} instead of {version}"
        for name, version in asked.pins.items()
        if versions.get(name, version) != version
    ]
    if changed:
        notes.append(f"The environment that saves and serves the model has {', '.join(changed)}.")
    return tuple(notes)


def locked_versions(lock: str) -> dict[str, str]:
    """Normalised name → version of every package in a lock."""
    return {canonicalize_name(found["name"]): found["version"] for found in _LOCKED.finditer(lock)}


def relax(requirement: str, *, is_bound_kept: bool) -> str | None:
    """A looser form of a requirement: no upper bounds; None when it has none.

    Args:
        requirement: a valid PEP 508 requirement.
        is_bound_kept: whether lower bounds stay (``==1.2`` becomes ``>=1.2``), or every bound goes.
    """
    parsed = Requirement(requirement)
    kept: list[str] = []
    for specifier in parsed.specifier if is_bound_kept else ():
        if specifier.operator in _KEPT_OPERATORS:
            kept.append(str(specifier))
        elif specifier.operator in _EXACT_OPERATORS:
            kept.append(f">={specifier.version.removesuffix('.*')}")
    parsed.specifier = SpecifierSet(",".join(kept))
    return str(parsed) if str(parsed) != requirement else None


def mentioned(explanation: str, names: Iterable[str]) -> list[str]:
    """Those of the normalised names that an explanation has, in the order of their first mention."""
    text = explanation.lower()
    places = {
        name: found.start()
        for name in names
        if (found := re.search(rf"(?<![a-z0-9._-]){re.escape(name)}(?![a-z0-9_-]|\.[a-z])", text))
    }
    return sorted(places, key=places.__getitem__)


def essence(output: str) -> str:
    """What a resolver said, as a sentence or two instead of a page."""
    lines = [_NOISE.sub("", line.strip()) for line in output.splitlines()]
    text = " ".join(line for line in lines if line).removeprefix(
        "No solution found when resolving dependencies "
    )
    text = text.removeprefix("No solution found when resolving dependencies: ")
    text = text.replace(
        "we can conclude that your requirements are unsatisfiable", "the requirements cannot be met"
    )
    if text and text[-1] not in ".!?":
        text += "."
    return text if len(text) <= _MAX_ESSENCE else text[: _MAX_ESSENCE - 1].rstrip() + "…"


def remedy(explanation: str) -> str | None:
    """What helps against a resolver's refusal; None when requirements have to be changed, whichever."""
    return next((help_ for pattern, help_ in _REMEDIES if pattern.search(explanation)), None)


def allow_only(lock: str, hashes: Mapping[str, tuple[str, ...]]) -> tuple[str, list[str]]:
    """Keep, for the packages named, only the hashes given.

    Returns:
        The narrowed lock, and the names of packages none of whose locked files has an allowed hash.
    """
    kept: list[str] = []
    missing: list[str] = []
    for block in _blocks(lock):
        name = next(iter(locked_versions(block)), "")
        if name not in hashes:
            kept.append(block)
            continue
        allowed = [found for found in hashes[name] if f"--hash={found}" in block]
        if not allowed:
            missing.append(name)
        head = block.split(" \\\n", 1)[0].rstrip()
        kept.append(" \\\n    ".join([head, *(f"--hash={found}" for found in allowed)]) + "\n")
    return "".join(kept), missing


def split_lock(lock: str, names: Container[str]) -> tuple[str, str]:
    """A lock without some of its packages, and these alone; comments stay with the first."""
    rest: list[str] = []
    those: list[str] = []
    for block in _blocks(lock):
        name = next(iter(locked_versions(block)), None)
        (those if name is not None and name in names else rest).append(block)
    return "".join(rest), "".join(those)


def _blocks(lock: str) -> list[str]:
    blocks: list[str] = []
    for line in lock.splitlines(keepends=True):
        if line.startswith((" ", "\t")) and blocks:
            blocks[-1] += line
        else:
            blocks.append(line)
    return blocks
