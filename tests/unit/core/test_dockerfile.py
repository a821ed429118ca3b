"""What is read of a Dockerfile: the images that have to be there, and the files that decide."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.dockerfile import Dockerfile, base_reference, read_dockerfile
from flops.errors import ErrorCode, FlopsError

PLAIN = "FROM python:3.11\n"


@pytest.mark.parametrize(
    ("text", "bases"),
    [
        ("FROM python:3.11", ("python:3.11",)),
        ("# a comment\n\n  from\tpython:3.11 \n", ("python:3.11",)),
        ("ARG V=3.11\nFROM python:${V}-slim", ("python:3.11-slim",)),
        ("ARG V='3.11'\nARG B=python:$V\nFROM $B", ("python:3.11",)),
        ("FROM python:${V:-3.11}", ("python:3.11",)),
        ("FROM gcc AS build\nFROM python\nCOPY --from=build /a /a", ("gcc", "python")),
        ("FROM gcc AS Build\nFROM build", ("gcc",)),
        ("FROM gcc\nFROM python\nCOPY --from=0 /a /a", ("gcc", "python")),
        ("FROM scratch\nADD root.tar /", ()),
        ("FROM python\nCOPY --chmod=755 --from=ghcr.io/x/uv:1 /uv /bin/", ("python", "ghcr.io/x/uv:1")),
        ("FROM python\nFROM python", ("python",)),
        ("FROM \\\n  # in between\n  python", ("python",)),
        ("# escape=`\nFROM `\npython", ("python",)),
    ],
)
def test_the_images_it_begins_with(text: str, bases: tuple[str, ...]) -> None:
    assert read_dockerfile(text).bases == bases


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("RUN true", ()),
        ("COPY requirements.txt ./system/ /opt/", ("requirements.txt", "system")),
        ('COPY ["a b.txt", "/to/"]', ("a b.txt",)),
        ("COPY --chown=1:1 a /", ("a",)),
        ("ADD https://example.org/x.tar /", ()),
        ("ADD a.tar /", ("a.tar",)),
        ("COPY a \\\n  b /", ("a", "b")),
        ("COPY . /", None),
        ("COPY ./ /", None),
        ("COPY a a* /", None),
        ("COPY $WHAT /", None),
        ("COPY a/../.. /", None),
        ("COPY [broken /", None),
        ("COPY . /\nCOPY a /", None),
        ("RUN --mount=type=bind,target=/src true", None),
        ("COPY --from=0 . /", ()),
    ],
)
def test_the_files_it_takes(text: str, sources: tuple[str, ...] | None) -> None:
    assert read_dockerfile(PLAIN + text).sources == sources


def test_variables_in_from_have_their_values_in_what_buildah_reads() -> None:
    text = (
        "ARG V=3.11\nFROM --platform=$TARGETPLATFORM \\\n  # in between\n  python:$V AS a\n"
        "RUN echo $V\nFROM b\n"
    )
    values = "ARG V=3.11\nFROM --platform=$TARGETPLATFORM python:3.11 AS a\n\n\nRUN echo $V\nFROM b\n"
    assert read_dockerfile(text).text == values
    plain = "FROM a \\\n  AS b\nCOPY --from=b $X /\n"
    assert read_dockerfile(plain).text == plain


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("FROM", 1),
        ("# first\nFROM $NOWHERE", 2),
        ("FROM a b", 1),
        ("FROM a\nARG X=b\nFROM $X", 3),  # an ARG below the first FROM is none for FROM
    ],
)
def test_a_from_that_names_no_image_is_refused_by_its_line(text: str, line: int) -> None:
    with pytest.raises(FlopsError) as caught:
        read_dockerfile(text, "Containerfile")
    assert caught.value.code is ErrorCode.DOCKERFILE_FAILED
    assert f"Containerfile, line {line}" in caught.value.message
    assert "ARG" in caught.value.hint


@pytest.mark.parametrize("text", ["", "RUN true", "# FROM a"])
def test_without_a_from_it_makes_nothing(text: str) -> None:
    with pytest.raises(FlopsError) as caught:
        read_dockerfile(text)
    assert caught.value.code is ErrorCode.DOCKERFILE_FAILED


def test_platforms_and_programs_are_noticed() -> None:
    text = "FROM --platform=linux/arm64 a\nFROM --platform=$TARGETPLATFORM b\nRUN x"
    assert read_dockerfile(text) == Dockerfile(
        text=f"{text}\n", bases=("a", "b"), platforms=("linux/arm64",), sources=(), runs_programs=True
    )
    assert not read_dockerfile(PLAIN).runs_programs


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("python", "registry-1.docker.io/library/python"),
        ("python:3.11-slim", "registry-1.docker.io/library/python:3.11-slim"),
        ("me/trainer:v1", "registry-1.docker.io/me/trainer:v1"),
        ("docker.io/library/python:3.11", "registry-1.docker.io/library/python:3.11"),
        ("localhost:5000/base:v1", "localhost:5000/base:v1"),
        ("ghcr.io/x/y@sha256:" + "a" * 64, "ghcr.io/x/y@sha256:" + "a" * 64),
    ],
)
def test_an_image_without_a_host_is_on_docker_hub(name: str, reference: str) -> None:
    assert str(base_reference(name)) == reference


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from(["FROM a\n", "COPY x \\\n", "ARG", "#", "[", "$", " "])).map("".join)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(FlopsError):
        assert all(read_dockerfile(text).bases)
