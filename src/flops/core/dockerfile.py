"""What a Dockerfile is made from: the images it begins with, and the files of the repository that it takes.

Only that much of it is read here; what its instructions do is buildah's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from flops.core.image_reference import ImageReference, is_host, parse_reference
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

NAMES = ("Dockerfile", "Containerfile")  # in a repository's root, the first that is there
_ESCAPE = re.compile(r"#\s*escape\s*=\s*(?P<escape>[\\`])\s*")
_VARIABLE = re.compile(r"\$(?:\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|(?P<plain>\w+))")
_FLAG = re.compile(r"--(?P<name>[a-z]+)(?:=(?P<value>\S*))?\s+")
_PATTERN = re.compile(r"[*?\[$\\]")  # a source that names more than one file, or is not known here
_TARGET_PLATFORM = "TARGETPLATFORM"
_DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"  # where it answers


class Dockerfile(Value):
    """What decides about the image that a Dockerfile makes, beside its own text.

    Args:
        text: the same Dockerfile, with values in place of variables in FROM, which buildah could not look up.
        bases: images that are not made by it, as it names them, each once.
        platforms: the platforms that stages ask for by name, such as ``linux/amd64``.
        sources: paths of the repository that it takes; None for all of them.
        runs_programs: whether programs of the image's platform run in it.
    """

    text: str
    bases: tuple[str, ...]
    platforms: tuple[str, ...] = ()
    sources: tuple[str, ...] | None = ()
    runs_programs: bool = False


def read_dockerfile(text: str, name: str = NAMES[0]) -> Dockerfile:
    """Read a Dockerfile.

    Args:
        text: its content.
        name: of the file, for people.

    Raises:
        FlopsError: ``dockerfile_failed`` when it has no FROM, or one that names no image.
    """
    reader = _Reader(name, text)
    for lines, instruction in _instructions(text):
        reader.take(lines, *instruction)
    return reader.finish()


def base_reference(name: str) -> ImageReference:
    """Where an image is that a Dockerfile names; without a host it is on Docker Hub.

    Raises:
        FlopsError: ``image_name_invalid``.
    """
    host, _, path = name.partition("/")
    if not path or not is_host(host):
        host, path = _DOCKER_HUB, name
    if host == _DOCKER_HUB:
        host, path = _DOCKER_HUB_API, path if "/" in path else f"library/{path}"
    return parse_reference(f"{host}/{path}")


class _Reader:
    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._lines = text.splitlines()
        self._arguments: dict[str, str] = {}  # of ARG before the first FROM; others do not count in FROM
        self._stages: list[str] = []
        self._bases: dict[str, None] = {}
        self._platforms: dict[str, None] = {}
        self._sources: dict[str, None] | None = {}
        self._runs_programs = False

    def take(self, lines: range, instruction: str, rest: str) -> None:
        """Take in the next instruction, and the numbers of its lines."""
        flags, rest = _flags(rest)
        if instruction == "ARG" and not self._stages:
            name, _, value = rest.partition("=")
            self._arguments[name.strip()] = _replace(value.strip().strip("\"'"), self._arguments)
        elif instruction == "FROM":
            self._begin_stage(lines, flags, rest)
        elif instruction in {"COPY", "ADD"}:
            self._copy(flags, rest)
        elif instruction == "RUN":
            self._runs_programs = True
            if "mount" in flags:  # of what, is said in words of its own
                self._sources = None

    def finish(self) -> Dockerfile:
        """What was read."""
        if not self._stages:
            raise FlopsError(ErrorCode.DOCKERFILE_FAILED, f"{self._name} has no FROM.")
        return Dockerfile(
            text="".join(f"{line}\n" for line in self._lines),
            bases=tuple(self._bases),
            platforms=tuple(self._platforms),
            sources=None if self._sources is None else tuple(self._sources),
            runs_programs=self._runs_programs,
        )

    def _begin_stage(self, lines: range, flags: Mapping[str, str], rest: str) -> None:
        words = _replace(rest, self._arguments).split()
        if not words or "$" in words[0] or len(words) not in {1, 3}:
            raise FlopsError(
                ErrorCode.DOCKERFILE_FAILED,
                f"{self._name}, line {lines.start}: FROM {rest} names no image.",
                hint="Write FROM IMAGE or FROM IMAGE AS NAME; a variable needs an ARG with a value above it.",
            )
        self._need(words[0])
        if "$" in rest:
            options = [f"--{name}={value}" for name, value in flags.items()]
            self._lines[lines.start - 1] = " ".join(["FROM", *options, *words])
            self._lines[lines.start : lines.stop - 1] = [""] * (len(lines) - 1)
        platform = flags.get("platform", "")
        if platform and _TARGET_PLATFORM not in platform:
            self._platforms[_replace(platform, self._arguments)] = None
        self._stages.append(words[2] if len(words) == 3 else "")

    def _need(self, image: str) -> None:
        if image != "scratch" and image.lower() not in {stage.lower() for stage in self._stages if stage}:
            self._bases[image] = None

    def _copy(self, flags: Mapping[str, str], rest: str) -> None:
        origin = flags.get("from")
        if origin is not None:
            if not origin.isdigit():  # else it is the number of a stage
                self._need(origin)
            return
        sources = _words(rest)[:-1]
        for source in sources:
            path = source.removeprefix("./").strip("/")
            if path in {"", "."} or _PATTERN.search(path) or ".." in path.split("/"):
                self._sources = None
            elif self._sources is not None and "://" not in path:
                self._sources[path] = None


def _instructions(text: str) -> Iterator[tuple[range, tuple[str, str]]]:
    """Every instruction with the numbers of its lines: its name in capitals, and the rest."""
    escape, start, parts = "\\", 0, list[str]()
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if number == 1 and (found := _ESCAPE.fullmatch(line)) is not None:
            escape = found["escape"]
        if line.startswith("#") or not line:
            continue  # also between the lines of one instruction
        start = start if parts else number
        parts.append(line.removesuffix(escape).strip())
        if not line.endswith(escape):
            yield range(start, number + 1), _split(" ".join(parts))
            parts = []
    if any(parts):  # the file ends in the middle of it
        yield range(start, number + 1), _split(" ".join(parts))


def _split(instruction: str) -> tuple[str, str]:
    name, *rest = instruction.split(maxsplit=1)
    return name.upper(), "".join(rest)


def _flags(rest: str) -> tuple[dict[str, str], str]:
    flags: dict[str, str] = {}
    while (found := _FLAG.match(rest)) is not None:
        flags[found["name"]] = found["value"] or ""
        rest = rest[found.end() :]
    return flags, rest


def _words(rest: str) -> list[str]:
    if rest.startswith("["):
        try:
            return [str(word) for word in json.loads(rest)]
        except ValueError:
            return [".", "."]  # buildah will say what is wrong
    return rest.split()


def _replace(text: str, values: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found["braced"] or found["plain"]
        return values.get(name) or (found[0] if found["default"] is None else found["default"])

    return _VARIABLE.sub(value, text)
