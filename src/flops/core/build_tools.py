"""What a machine can build for which platform, and what it is missing: rules over what was found on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flops.core.health import Finding, Severity, fine, known, problem
from flops.core.model import Value
from flops.core.platforms import Platform

BUILDING = "building"
DOCKERFILES = "running Dockerfiles"
RUNNING = "running images"


class BuildTools(Value):
    """What was found on a machine.

    Args:
        platform: of the machine; None for one that no images are made for.
        missing: programs without which nothing can be built, such as ``git``.
        missing_for_base: Debian packages without which no base of images can be made here.
        python: the machine's ``major.minor``, which dependencies are locked for unless a project asks.
        base_python: that of the base that is made here.
        missing_for_dockerfiles: Debian packages without which no Dockerfile can be run here.
        has_engine: whether a container engine is there.
        emulated: platforms whose programs run here by emulation.
    """

    platform: Platform | None
    missing: tuple[str, ...] = ()
    missing_for_base: tuple[str, ...] = ()
    python: str
    base_python: str
    missing_for_dockerfiles: tuple[str, ...] = ()
    has_engine: bool = False
    emulated: tuple[Platform, ...] = ()


def build_findings(tools: BuildTools) -> Iterator[Finding]:
    """What can be built here for which platform, and what is missing for the rest."""
    for name in tools.missing:
        yield problem(BUILDING, "everything", f"{name} cannot be found on PATH.", f"Install {name}.")
    if tools.missing:
        return
    own = f" for {tools.platform}" if tools.platform else ""
    yield fine(BUILDING, "environments", f"Environments{own} are built here.")
    for platform in Platform:
        yield _base_finding(tools, platform)
        yield _dockerfile_finding(tools, platform)
        yield from _run_findings(tools, platform)
    if tools.python != tools.base_python and not tools.missing_for_base:
        yield known(
            BUILDING,
            "images",
            f"The base has Python {tools.base_python}, this machine Python {tools.python}, for which "
            "dependencies are locked.",
            f"Have projects ask for Python {tools.base_python}, which has to be installed here, or have the "
            "control plane name a base image (FLOPS_BASE_IMAGE).",
        )


def _base_finding(tools: BuildTools, platform: Platform) -> Finding:
    how = "" if platform is tools.platform else ", without emulation"
    if not tools.missing_for_base:
        return fine(BUILDING, platform, f"Images for {platform} are made here on Debian's packages{how}.")
    return known(
        BUILDING,
        platform,
        f"Images for {platform} are made here{how}, but only on a base image from a registry (missing: "
        f"{', '.join(tools.missing_for_base)}).",
        f"Debian: `apt-get install {' '.join(tools.missing_for_base)}`; or have the control plane name a "
        "base image (FLOPS_BASE_IMAGE).",
    )


def _dockerfile_finding(tools: BuildTools, platform: Platform) -> Finding:
    """Repositories seldom have a Dockerfile, so what it lacks is no lack of the addon."""
    what = f"Dockerfiles for {platform}"
    if tools.missing_for_dockerfiles:
        missing = " ".join(tools.missing_for_dockerfiles)
        return known(
            DOCKERFILES,
            platform,
            f"{what} are not run here: {missing} is missing.",
            f"For repositories with a Dockerfile: `apt-get install {missing}` (Debian).",
        )
    if platform is not tools.platform and platform not in tools.emulated:
        return known(
            DOCKERFILES,
            platform,
            f"{what} are not run here, as nothing emulates it.",
            "For repositories with a Dockerfile, install qemu-user-static (Debian: with binfmt-support), or "
            "build on a machine of that platform.",
        )
    return fine(DOCKERFILES, platform, f"{what} are run here.")


def _run_findings(tools: BuildTools, platform: Platform) -> Iterator[Finding]:
    """What keeps images from being run where they are made; making them needs nothing of it."""
    if not tools.has_engine:
        what = f"Images for {platform} are not run here, which making them does not need: there is no engine."
        yield known(RUNNING, platform, what, "To run them, install podman or Docker (docs/containers.md).")
    elif platform is not tools.platform and platform not in tools.emulated:
        what = (
            f"Images for {platform} are not run here, which making them does not need: nothing emulates it."
        )
        advice = "To try them out, install qemu-user-static (Debian: with binfmt-support)."
        yield known(RUNNING, platform, what, advice)


def missing_sentence(findings: Iterable[Finding]) -> str:
    """What building lacks, for the state of the addon; "" when everything can be built."""
    lacking = [f for f in findings if f.check == BUILDING and f.severity is not Severity.OK]
    return " ".join(finding.what for finding in lacking)
