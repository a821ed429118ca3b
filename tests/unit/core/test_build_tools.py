"""What operators read about what their machine can build, by example."""

from __future__ import annotations

import pytest

from flops.core.build_tools import BuildTools, build_findings, missing_sentence
from flops.core.platforms import Platform

EQUIPPED = BuildTools(
    platform=Platform.AMD64,
    python="3.11",
    base_python="3.11",
    has_engine=True,
    emulated=(Platform.ARM64,),
)
ALL = [
    "ok: Environments for linux/amd64 are built here.",
    "ok: Images for linux/amd64 are made here on Debian's packages.",
    "ok: Dockerfiles for linux/amd64 are run here.",
    "ok: Images for linux/arm64 are made here on Debian's packages, without emulation.",
    "ok: Dockerfiles for linux/arm64 are run here.",
]
GET_BUILDAH = "buildah is missing. For repositories with a Dockerfile: `apt-get install buildah` (Debian)."
GET_EMULATION = "To try them out, install qemu-user-static (Debian: with binfmt-support)."
GET_ENGINE = "To run them, install podman or Docker (docs/containers.md)."
GET_BASE = (
    "Debian: `apt-get install mmdebstrap`; or have the control plane name a base image (FLOPS_BASE_IMAGE)."
)


def said(tools: BuildTools) -> list[str]:
    return [f"{found.severity}: {found.what} {found.advice}".rstrip() for found in build_findings(tools)]


@pytest.mark.parametrize(
    ("changes", "lines", "missing"),
    [
        pytest.param({}, ALL, "", id="everything"),
        pytest.param(
            {"emulated": ()},
            [
                *ALL[:4],
                "info: Dockerfiles for linux/arm64 are not run here, as nothing emulates it. For repositories"
                " with a Dockerfile, install qemu-user-static (Debian: with binfmt-support), or build on a"
                " machine of that platform.",
                "info: Images for linux/arm64 are not run here, which making them does not need: nothing"
                f" emulates it. {GET_EMULATION}",
            ],
            "",
            id="no emulation",
        ),
        pytest.param(
            {"has_engine": False},
            [
                *ALL[:3],
                "info: Images for linux/amd64 are not run here, which making them does not need: there is no"
                f" engine. {GET_ENGINE}",
                *ALL[3:],
                "info: Images for linux/arm64 are not run here, which making them does not need: there is no"
                f" engine. {GET_ENGINE}",
            ],
            "",
            id="no engine",
        ),
        pytest.param(
            {"missing_for_base": ("mmdebstrap",)},
            [
                ALL[0],
                "info: Images for linux/amd64 are made here, but only on a base image from a registry"
                f" (missing: mmdebstrap). {GET_BASE}",
                ALL[2],
                "info: Images for linux/arm64 are made here, without emulation, but only on a base image from"
                f" a registry (missing: mmdebstrap). {GET_BASE}",
                ALL[4],
            ],
            "Images for linux/amd64 are made here, but only on a base image from a registry (missing:"
            " mmdebstrap). Images for linux/arm64 are made here, without emulation, but only on a base image"
            " from a registry (missing: mmdebstrap).",
            id="no base",
        ),
        pytest.param(
            {"missing_for_dockerfiles": ("buildah",)},
            [
                *ALL[:2],
                f"info: Dockerfiles for linux/amd64 are not run here: {GET_BUILDAH}",
                ALL[3],
                f"info: Dockerfiles for linux/arm64 are not run here: {GET_BUILDAH}",
            ],
            "",
            id="no buildah",
        ),
        pytest.param(
            {"python": "3.12"},
            [
                *ALL,
                "info: The base has Python 3.11, this machine Python 3.12, for which dependencies are locked."
                " Have projects ask for Python 3.11, which has to be installed here, or have the control"
                " plane name a base image (FLOPS_BASE_IMAGE).",
            ],
            "The base has Python 3.11, this machine Python 3.12, for which dependencies are locked.",
            id="another Python",
        ),
        pytest.param(
            {"missing": ("git",), "missing_for_base": ("mmdebstrap",)},
            ["problem: git cannot be found on PATH. Install git."],
            "git cannot be found on PATH.",
            id="nothing at all",
        ),
        pytest.param(
            {"platform": None, "emulated": tuple(Platform)},
            [
                "ok: Environments are built here.",
                f"{ALL[1][:-1]}, without emulation.",
                *ALL[2:],
            ],
            "",
            id="a machine of another kind",
        ),
    ],
)
def test_what_can_be_built_is_said_for_each_platform(
    changes: dict[str, object], lines: list[str], missing: str
) -> None:
    tools = EQUIPPED.model_copy(update=changes)
    assert said(tools) == lines
    assert missing_sentence(build_findings(tools)) == missing
