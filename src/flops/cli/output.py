"""The output contract of every command: data on stdout, prose on stderr, one JSON envelope, exit codes.

A command prints its result with `print_data` (and `print_table` inside its ``show``), tells people what it
does with `say`, and raises `FlopsError` for everything that goes wrong. `run_app` turns errors into sentences
and exit codes, so no command prints an error or a traceback itself.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from enum import Enum, StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import click
import typer

from flops.errors import ErrorCode, FlopsError

SCHEMA_VERSION = 1
INTERRUPTED_EXIT_CODE = 130
BROKEN_PIPE_EXIT_CODE = 141
_URL_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s@]+(@)")


class OutputFormat(StrEnum):
    """How a command prints its data."""

    TABLE = "table"
    JSON = "json"


FormatOption = Annotated[
    OutputFormat,
    typer.Option("--format", help="table for people, json for programs: one envelope on stdout."),
]


def say(text: str = "") -> None:
    """Tell people something: one or more lines on stderr."""
    _write(sys.stderr, text)


def print_line(text: str = "") -> None:
    """Print a line of data on stdout; beside JSON only inside the ``show`` of `print_data`."""
    _write(sys.stdout, text)


def print_data(data: Any, output_format: OutputFormat, show: Callable[[], None]) -> None:
    """Print a command's result.

    Args:
        data: what the JSON envelope carries: pydantic models, mappings, sequences, plain values.
        output_format: JSON prints the envelope, TABLE calls `show`.
        show: prints the same for people, with `print_table` and `print_line`.
    """
    if output_format is OutputFormat.JSON:
        _print_envelope("data", to_json(data))
    else:
        show()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str = "") -> None:
    """Print rows under a header: drawn by Rich on a terminal, aligned plain text elsewhere.

    Args:
        columns: the header.
        rows: cells in the order of the columns; None is an empty cell.
        empty: sentence told on stderr when there are no rows.
    """
    if not rows:
        say(empty)
        return
    cells = [["" if cell is None else hide_passwords(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich_table(columns, cells)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print_line("  ".join(padded).rstrip())


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Print names and values, one pair a line; pairs without a value are left out."""
    shown = [(name, str(value)) for name, value in facts if value not in (None, "", ())]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print_line(f"{name.ljust(width)}  {value}")


def timestamp(seconds: float) -> str:
    """A time, given in seconds since the epoch, in the time zone of this machine."""
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M:%S}"


def duration(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 5 s``, ``2 h 0 min``; clocks that disagree make it 0 s."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def print_error(error: FlopsError, output_format: OutputFormat) -> None:
    """Print an error: sentence, hint and details on stderr, and the envelope on stdout in JSON mode."""
    if output_format is OutputFormat.JSON:
        _print_envelope("error", to_json(error.to_dict()))
    say(f"Error: {error.message} [{error.code.value}]")
    short, long = _split_details(error.details)
    if short:
        say("  " + ", ".join(f"{name}: {value}" for name, value in short))
    for text in long:
        say("\n".join(f"  {line}" for line in text.rstrip().splitlines()))
    if error.hint:
        say(f"Hint: {error.hint}")


def hide_passwords(text: str) -> str:
    """Replace passwords inside URLs by ``***``."""
    return _URL_PASSWORD.sub(r"\1***\2", text)


def to_json(value: Any) -> Any:
    """Turn models, enums, paths and mappings into plain JSON types."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value


def run_app(app: typer.Typer, argv: Sequence[str], *, prog_name: str, log_folder: Path) -> int:
    """Run a command line and return its exit code; nothing escapes as a traceback.

    Args:
        app: the commands; they raise `FlopsError` for what goes wrong.
        argv: arguments without the program's name.
        prog_name: name for usage texts.
        log_folder: where the traceback of an unexpected exception is kept.

    Returns:
        0, the exit code of the error's catalogue entry, 130 after Ctrl+C, or 141 when the reader of a pipe
        went away.
    """
    _make_streams_robust()
    output_format = _requested_format(argv)
    try:
        result = typer.main.get_command(app).main(list(argv), prog_name=prog_name, standalone_mode=False)
    except FlopsError as exc:
        print_error(exc, output_format)
        return exc.spec.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED_EXIT_CODE
    except click.ClickException as exc:
        return _report_usage(exc, output_format)
    except Exception as exc:  # noqa: BLE001 (the last line of defence: users get a sentence, the log the rest)
        error = _internal_error(exc, log_folder)
        print_error(error, output_format)
        return error.spec.exit_code
    return result if isinstance(result, int) else 0


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(hide_passwords(text) + "\n")
        stream.flush()
    except BrokenPipeError:
        _leave_broken_pipe(stream)


def _print_envelope(key: str, value: Any) -> None:
    envelope = {"schema_version": SCHEMA_VERSION, key: value}
    _write(sys.stdout, json.dumps(envelope, indent=2, ensure_ascii=False, default=str))


def _print_rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(file=sys.stdout).print(table)


def _split_details(details: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[str]]:
    """Details worth showing: short facts, and texts of several lines such as a traceback."""
    short: list[tuple[str, Any]] = []
    long: list[str] = []
    for name, value in details.items():
        if isinstance(value, str) and "\n" in value.strip():
            long.append(value)
        elif isinstance(value, (str, int, float)) and value != "":
            short.append((name, value))
    return short, long


def _requested_format(argv: Sequence[str]) -> OutputFormat:
    """The format asked for, known also when the command line cannot be parsed."""
    is_json = "--format=json" in argv or ("--format", "json") in pairwise(argv)
    return OutputFormat.JSON if is_json else OutputFormat.TABLE


def _report_usage(exc: click.ClickException, output_format: OutputFormat) -> int:
    context = getattr(exc, "ctx", None)
    if isinstance(exc, click.exceptions.NoArgsIsHelpError):
        if text := exc.format_message():  # empty when Rich has printed the help already
            say(text)
        return exc.exit_code
    hint = f"See `{context.command_path} --help`." if context is not None else None
    error = FlopsError(ErrorCode.USAGE, exc.format_message(), hint=hint)
    print_error(error, output_format)
    return error.spec.exit_code


def _internal_error(exc: Exception, log_folder: Path) -> FlopsError:
    """Keep the traceback in a file and say where."""
    from flops.log import redact

    now = datetime.now(UTC)
    name = f"cli-{now:%Y%m%dT%H%M%S.%f}.log"
    text = redact("".join(traceback.format_exception(exc)))
    for folder in (log_folder, Path(tempfile.gettempdir())):
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / name
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
            return FlopsError(
                ErrorCode.INTERNAL,
                f"The command ended by {type(exc).__name__}: {exc}.",
                hint=f"This is a defect of FLOps. Please report it with {path}.",
                details={"log_file": str(path)},
            )
    return FlopsError(ErrorCode.INTERNAL, f"The command ended by {type(exc).__name__}: {exc}.")


def _make_streams_robust() -> None:
    """Have characters that the terminal's encoding lacks replaced, not raised."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _leave_broken_pipe(stream: TextIO) -> NoReturn:
    """The reader is gone (``| head``): leave without the interpreter's complaint at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise typer.Exit(BROKEN_PIPE_EXIT_CODE)
