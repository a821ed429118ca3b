"""What is given up when requirements do not go together, and what is told."""

from __future__ import annotations

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from flops.core.resolution import (
    Problem,
    UnsolvableError,
    allow_only,
    essence,
    locked_versions,
    mentioned,
    relax,
    solve,
    split_lock,
)


class Resolver:
    """Resolves against a small index; the platform's own package needs what `needs` says."""

    def __init__(self, index: dict[str, list[str]], needs: tuple[str, ...] = ()) -> None:
        self._index = index
        self._needs = needs
        self.attempts = 0

    def __call__(self, problem: Problem) -> str:
        self.attempts += 1
        asked = [Requirement(text) for text in (*problem.own, *problem.needed, *self._needs)]
        lock = ""
        for name in sorted({requirement.name for requirement in asked}):
            pins = [Requirement(f"{name}=={problem.pins[name]}")] if name in problem.pins else []
            limits = [requirement for requirement in (*asked, *pins) if requirement.name == name]
            fitting = [v for v in self._index.get(name, []) if all(v in limit.specifier for limit in limits)]
            if not fitting:
                raise UnsolvableError(f"Because you require {' and '.join(map(str, limits))}, no.")
            lock += f"{name}=={max(fitting, key=Version)} \\\n    --hash=sha256:00\n"
        return lock


def test_what_can_be_met_is_met_as_it_is() -> None:
    resolver = Resolver({"numpy": ["1.26.4", "2.1"]}, ("numpy>=1",))
    solution = solve(Problem(("numpy==1.26.4",), ("numpy",)), resolver)
    assert locked_versions(solution.lock) == {"numpy": "1.26.4"}
    assert solution.notes == ()
    assert resolver.attempts == 1


def test_a_pin_that_the_platform_cannot_do_with_is_loosened_and_told() -> None:
    index = {"packaging": ["19.0", "24.0"], "numpy": ["1.26.4", "2.1"]}
    solution = solve(
        Problem(("packaging==19.0", "numpy==1.26.4")), Resolver(index, ("packaging>=20", "numpy"))
    )
    assert locked_versions(solution.lock) == {"packaging": "24.0", "numpy": "1.26.4"}
    assert solution.own == ("packaging>=19.0", "numpy==1.26.4")
    assert len(solution.notes) == 1
    assert solution.notes[0].startswith("packaging==19.0 was loosened, the environment has 24.0:")


def test_a_pin_that_is_too_new_loses_its_lower_bound_too() -> None:
    solution = solve(Problem(("protobuf==8.0",)), Resolver({"protobuf": ["7.0", "8.0"]}, ("protobuf<8",)))
    assert locked_versions(solution.lock) == {"protobuf": "7.0"}
    assert solution.own == ("protobuf",)


def test_pins_that_nobody_asked_for_go_first() -> None:
    index = {"protobuf": ["7.0", "8.0"], "numpy": ["1.26.4"]}
    problem = Problem(("numpy==1.26.4",), ("protobuf",), {"protobuf": "8.0", "numpy": "1.26.4"})
    solution = solve(problem, Resolver(index, ("protobuf<8",)))
    assert solution.own == ("numpy==1.26.4",)
    assert solution.notes == (
        "The environment that saves and serves the model has protobuf 7.0 instead of 8.0.",
    )


def test_two_pins_are_loosened_one_after_the_other() -> None:
    index = {"a": ["1", "2"], "b": ["1", "2"]}
    solution = solve(Problem(("a==1", "b==1")), Resolver(index, ("a>=2", "b>=2")))
    assert solution.own == ("a>=1", "b>=1")
    assert len(solution.notes) == 2


def test_what_cannot_be_met_is_not_met() -> None:
    with pytest.raises(UnsolvableError, match="missing"):
        solve(Problem(("missing",)), Resolver({}))


@pytest.mark.parametrize(
    ("requirement", "with_bound", "without"),
    [
        ("numpy==1.26.4", "numpy>=1.26.4", "numpy"),
        ("numpy==1.26.*", "numpy>=1.26", "numpy"),
        ("numpy~=1.26", "numpy>=1.26", "numpy"),
        ("numpy<2", "numpy", "numpy"),
        ("numpy>=1", None, "numpy"),
        ("numpy", None, None),
        ('x[extra]==1; python_version < "3.12"', 'x[extra]>=1; python_version < "3.12"',
         'x[extra]; python_version < "3.12"'),
    ],
)  # fmt: skip
def test_relax(requirement: str, with_bound: str | None, without: str | None) -> None:
    assert relax(requirement, is_bound_kept=True) == with_bound
    assert relax(requirement, is_bound_kept=False) == without


def test_only_whole_names_are_mentioned() -> None:
    text = "Because mlflow-skinny==3 depends on Packaging<27 and you require packaging==30, numpy.testing no"
    assert mentioned(text, ["numpy", "packaging", "mlflow", "skinny"]) == ["packaging"]


def test_the_essence_is_short() -> None:
    output = (
        "error: No solution found when resolving dependencies\n"
        "  cause: Because you require numpy==1.26.4 and numpy>=2, we can conclude that your requirements are "
        "unsatisfiable.\n"
    )
    assert essence(output) == (
        "Because you require numpy==1.26.4 and numpy>=2, the requirements cannot be met."
    )
    assert len(essence("x " * 10_000)) <= 700


def test_only_allowed_hashes_stay() -> None:
    lock = "a==1 \\\n    --hash=sha256:01 \\\n    --hash=sha256:02\nb==2 \\\n    --hash=sha256:03\n"
    narrowed, missing = allow_only(lock, {"a": ("sha256:02", "sha256:99")})
    assert narrowed == "a==1 \\\n    --hash=sha256:02\nb==2 \\\n    --hash=sha256:03\n"
    assert missing == []
    assert allow_only(lock, {"b": ("sha256:99",)})[1] == ["b"]
    assert allow_only(lock, {}) == (lock, [])


def test_a_lock_is_split_by_names() -> None:
    first = "# python 3.11\na==1 \\\n    --hash=sha256:1\n    # via x\n"
    second, third = "B_c==2 \\\n    --hash=sha256:2\n", "d==3 \\\n    --hash=sha256:3\n"
    lock = first + second + third
    assert split_lock(lock, {"b-c"}) == (first + third, second)
    assert split_lock(lock, ()) == (lock, "")
