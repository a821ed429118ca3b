"""The documents name everything there is, and nothing else; their links lead somewhere."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flops.cli.flops import app
from flops.core.sla import MockDataSla, PartitionerName, ProjectSla, StrategyName
from flops.core.strategies import STRATEGY_PARAMETERS
from flops.errors import CATALOGUE, ErrorCode
from flops.settings import ClientSettings, ControlSettings, NodeSettings, RelaySettings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def read(name: str) -> str:
    return (DOCS / name).read_text()


def rows(name: str) -> dict[str, list[str]]:
    """Table rows of a document by what stands in backticks in their first cell."""
    found: dict[str, list[str]] = {}
    for line in read(name).splitlines():
        if match := re.match(r"\| `([^`]+)`", line):
            found.setdefault(match[1], []).append(line)
    return found


# Errors


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_has_a_section_with_its_numbers(code: ErrorCode) -> None:
    spec = CATALOGUE[code]
    section = re.search(rf"^### {code.value}\n(.*?)(?=^##|\Z)", read("errors.md"), re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/errors.md has no section {code.value}"
    assert f"Exit code {spec.exit_code}, HTTP status {spec.http_status}." in section[1]
    assert "**What to do:**" in section[1]


def test_no_section_is_about_an_error_that_is_gone() -> None:
    sections = re.findall(r"^### (\S+)$", read("errors.md"), re.MULTILINE)
    assert set(sections) == {code.value for code in ErrorCode}


def test_hints_name_documents_that_exist() -> None:
    for code, spec in CATALOGUE.items():
        for name in re.findall(r"docs/[\w-]+\.md", spec.hint):
            assert (ROOT / name).exists(), f"the hint of {code.value} names {name}"


# SLAs


def sla_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield prefix + (field.alias or name), field
        nested = nested_model(field.annotation)
        if nested is not None:
            inner = "" if name in {"training_configuration", "mock_data_configuration"} else f"{name}."
            yield from sla_fields(nested, inner)


def nested_model(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation]
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        candidates = list(typing.get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def bounds(field: FieldInfo) -> set[str]:
    """Numbers that limit a field: of itself, or of what may stand in its place."""
    items = [*field.metadata]
    for argument in typing.get_args(field.annotation):
        items += getattr(argument, "__metadata__", ())
    flat = [inner for item in items for inner in (item, *getattr(item, "metadata", ()))]
    names = ("ge", "gt", "le", "lt", "min_length", "max_length")
    found = {getattr(item, name) for item in flat for name in names if hasattr(item, name)}
    return {f"{number:.0f}" for number in found if number is not None}


SLA_FIELDS = [*sla_fields(ProjectSla), *sla_fields(MockDataSla)]


@pytest.mark.parametrize(
    ("key", "field"), SLA_FIELDS, ids=[f"{number}-{key}" for number, (key, _) in enumerate(SLA_FIELDS)]
)
def test_every_sla_key_is_explained_with_default_and_range(key: str, field: FieldInfo) -> None:
    text = read("sla.md")
    if key.removeprefix("cluster_") in {"strategy.name", "strategy.parameters", "partitioner.name"}:
        assert f"`{key}`" in text
        return
    lines = rows("sla.md").get(key)
    assert lines, f"docs/sla.md has no row for `{key}`"
    default = "" if field.is_required() else json.dumps(plain(field.get_default(call_default_factory=True)))
    shown = [line.strip("|").split("|")[1].strip("` ") for line in lines]
    nested = nested_model(field.annotation) is not None and default not in {"", "null"}
    assert nested or default in shown, f"`{key}` has the default {default}, not {shown}"
    needed = bounds(field) - {"1000000"} if "min_" in key else bounds(field)
    for number in needed:
        assert any(re.search(rf"(?<!\d){number}(?!\d)", line) for line in lines), (
            f"`{key}` is bounded by {number}"
        )


def plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def test_every_strategy_and_partitioner_is_explained() -> None:
    table = rows("sla.md")
    for name in StrategyName:
        (line,) = table[name.value]
        for parameter in STRATEGY_PARAMETERS[name.value]:
            assert f"`{parameter}`" in line
    for partitioner in PartitionerName:
        assert partitioner.value in table


def test_no_row_explains_an_sla_key_that_is_gone() -> None:
    known = {key for key, _ in SLA_FIELDS} | {*StrategyName} | {*PartitionerName}
    assert set(rows("sla.md")) <= known


# Commands


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            if not child.hidden:
                yield from commands(child, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(commands(typer.main.get_command(app), ("flops",)))
EVERYWHERE = {"--format", "--help", "-h"}
OF_ALL_DATA_COMMANDS = {"--server", "--token-file", "--home"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_explained_with_its_options(name: str) -> None:
    lines = [
        line for key, found in rows("cli.md").items() if f"{key} ".startswith(f"{name} ") for line in found
    ]
    assert lines, f"docs/cli.md has no row for `{name}`"
    for parameter in COMMANDS[name].params:
        if isinstance(parameter, click.Option):
            for option in {*parameter.opts} - EVERYWHERE:
                if not (name.startswith("flops data ") and option in OF_ALL_DATA_COMMANDS):
                    assert any(option in line for line in lines), f"`{name} {option}` is not explained"


def test_no_row_explains_a_command_that_is_gone() -> None:
    for key in rows("cli.md"):
        assert any(f"{key} ".startswith(f"{name} ") for name in COMMANDS), f"there is no `{key}`"


def test_global_options_are_explained() -> None:
    for parameter in typer.main.get_command(app).params:
        for option in parameter.opts:
            if option != "-h":
                assert option in read("cli.md")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_text_and_a_json_form(name: str) -> None:
    assert COMMANDS[name].help
    assert any("--format" in parameter.opts for parameter in COMMANDS[name].params)


# Settings


@pytest.mark.parametrize("settings", [ControlSettings, ClientSettings, NodeSettings, RelaySettings])
def test_every_setting_is_explained_with_its_default(settings: type[BaseModel]) -> None:
    table = rows("settings.md")
    for name, field in settings.model_fields.items():
        lines = table.get(f"FLOPS_{name.upper()}")
        assert lines, f"docs/settings.md has no row for FLOPS_{name.upper()}"
        if field.default_factory is None and field.default is not None:
            assert any(f"`{field.default}`" in line for line in lines)


def test_no_row_explains_a_setting_that_is_gone() -> None:
    known = {
        f"FLOPS_{name.upper()}"
        for settings in (ControlSettings, ClientSettings, NodeSettings, RelaySettings)
        for name in settings.model_fields
    }
    assert {key for key in rows("settings.md") if key.startswith("FLOPS_")} == known


# REST


def test_every_endpoint_is_explained() -> None:
    from flops.manager.app import build_app
    from flops.testing.one_cluster import OneCluster
    from flops.testing.projects import played_cluster
    from flops.wire.rest import ControlStatus

    def status() -> ControlStatus:
        raise NotImplementedError

    with played_cluster() as cluster:
        app = build_app(
            cluster.engine,
            token="t",
            status=status,
            blobs=cluster.blobs,
            images=cluster.shelf(),
            clusters=OneCluster(),
        )
        paths = app.openapi()["paths"]
    endpoints = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert endpoints == {key for key in rows("api.md") if re.match(r"(GET|POST|PUT|DELETE) ", key)}


# Links and blocks


def anchors(document: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{document.name} links to {link}: no such heading"


def test_every_document_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+\.md)\)", read("index.md")))
    for document in DOCS.glob("*.md"):
        assert document.name == "index.md" or document.name in linked, f"docs/index.md lacks {document.name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_json_blocks_are_json(document: Path) -> None:
    for block in re.findall(r"```json\n(.*?)```", document.read_text(), re.DOTALL):
        json.loads(block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flops_commands_in_documents_exist(document: Path) -> None:
    """Commands inside backticks and console blocks are ones that the command line knows."""
    text = document.read_text()
    quoted = re.findall(r"`(flops [a-z][^`]*)`", text) + re.findall(
        r"^\$ (flops [a-z].*)$", text, re.MULTILINE
    )
    known = {tuple(name.split()) for name in COMMANDS} | {("flops", "p"), ("flops", "data")}
    known |= {name[:2] for name in known}
    for command in quoted:
        words = [word.rstrip(".,;:") for word in command.split()]
        assert tuple(words[:3]) in known or tuple(words[:2]) in known, f"{document.name}: `{command}`"


# Reliability


def test_every_fault_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", read("reliability.md"))
    assert named
    for path, test in named:
        assert f"def {test}" in (ROOT / path).read_text(), f"{path} has no {test}"


def test_every_fault_has_a_test() -> None:
    faults = [
        line
        for line in read("reliability.md").splitlines()
        if line.startswith("| ") and "| fault |" not in line
    ]
    assert faults
    assert [line for line in faults if "`tests/" not in line] == []
