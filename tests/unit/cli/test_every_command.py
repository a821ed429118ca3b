"""What every command keeps to, whatever it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from flops.cli.flops import app
from flops.errors import CATALOGUE, ErrorCode

from .conftest import Flops


def leaves(
    command: click.Command, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from leaves(child, (*path, name))
    else:
        yield path, command


COMMANDS = list(leaves(typer.main.get_command(app)))
NEED_NO_MANAGER = {"connect", "disconnect", "up", "down", "version", "data", "doctor"}
OF_RELAYS = {("cluster", "up"), ("cluster", "down")}


def ids(item: object) -> str:
    return " ".join(item) if isinstance(item, tuple) else ""


@pytest.mark.parametrize(("path", "leaf"), COMMANDS, ids=ids)
def test_a_wrong_option_is_one_envelope(command: Flops, path: tuple[str, ...], leaf: click.Command) -> None:
    outcome = command(*path, "--format", "json", "--nonsense")
    assert outcome.exit_code == CATALOGUE[ErrorCode.USAGE].exit_code
    assert outcome.error["code"] == "usage"
    assert "--help" in outcome.error["hint"]
    assert outcome.err.startswith("Error: ")


@pytest.mark.parametrize(
    ("path", "leaf"),
    [item for item in COMMANDS if item[0][0] not in NEED_NO_MANAGER and item[0] not in OF_RELAYS],
    ids=ids,
)
def test_without_a_manager_every_command_says_how_to_start_one(
    command: Flops, path: tuple[str, ...], leaf: click.Command, tmp_path: Path
) -> None:
    sla = tmp_path / "sla.json"
    if path[0] in {"mock-data", "mock_data", "m"}:
        sla.write_text('{"mock_data_configuration": {"data_tag": "mnist"}}')
    else:
        sla.write_text(
            '{"ml_repo_url": "https://x/y", "ml_model_flavor": "sklearn",'
            ' "training_configuration": {"data_tags": ["mnist"]}}'
        )
    arguments = [str(sla) for parameter in leaf.params if isinstance(parameter, click.Argument)]
    outcome = command(*path, *arguments, "--format", "json")
    assert outcome.exit_code == CATALOGUE[ErrorCode.UNREACHABLE].exit_code
    assert outcome.error["code"] == "unreachable"
    assert "flops up" in outcome.error["hint"]
