from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from flops.cli.output import (
    FormatOption,
    OutputFormat,
    hide_passwords,
    print_data,
    print_facts,
    print_table,
    run_app,
    say,
)
from flops.core.project import Stage
from flops.errors import CATALOGUE, ErrorCode, FlopsError

app = typer.Typer()


@app.command("list")
def list_things(output_format: FormatOption = OutputFormat.TABLE) -> None:
    say("looking")
    things = [{"name": "a", "stage": Stage.TRAINING}, {"name": "long name", "stage": None}]
    print_data(
        things,
        output_format,
        lambda: print_table(["NAME", "STAGE"], [[thing["name"], thing["stage"]] for thing in things]),
    )


@app.command("fail")
def fail(
    code: Annotated[str, typer.Argument()] = "user_code_failed",
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    raise FlopsError(
        ErrorCode(code),
        "fit_model raised ValueError on node-1.",
        details={"traceback": "Traceback:\n  boom", "node": "node-1", "round": 2, "problems": []},
    )


@app.command("crash")
def crash(output_format: FormatOption = OutputFormat.TABLE) -> None:
    raise RuntimeError("unforeseen")


@app.command("interrupt")
def interrupt() -> None:
    raise KeyboardInterrupt


@app.command("many")
def many() -> None:
    print_table(["N"], [[n] for n in range(100_000)])


def run(*argv: str, log_folder: Path = Path("/nonexistent")) -> int:
    return run_app(app, argv, prog_name="tool", log_folder=log_folder)


def test_data_go_to_stdout_and_prose_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    captured = capsys.readouterr()
    assert captured.out == "NAME       STAGE\na          training\nlong name\n"
    assert captured.err == "looking\n"


def test_json_is_exactly_one_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--format", "json") == 0
    data = [{"name": "a", "stage": "training"}, {"name": "long name", "stage": None}]
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "data": data}


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_ends_with_the_exit_code_of_its_catalogue_entry(code: ErrorCode) -> None:
    assert run("fail", code.value) == CATALOGUE[code].exit_code


def test_an_error_is_a_sentence_with_its_details_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail") == 40
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "Error: fit_model raised ValueError on node-1. [user_code_failed]",
        "  node: node-1, round: 2",
        "  Traceback:",
        "    boom",
        f"Hint: {CATALOGUE[ErrorCode.USER_CODE_FAILED].hint}",
    ]


def test_an_error_in_json_mode_is_the_one_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fail", "--format=json") == 40
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert error["code"] == "user_code_failed"
    assert error["details"]["round"] == 2
    assert set(error) == {"code", "message", "hint", "details"}
    assert "Error: fit_model raised" in captured.err


def test_an_unforeseen_exception_is_kept_in_a_log_and_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("crash", "--format", "json", log_folder=tmp_path / "logs") == 100
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    error = json.loads(captured.out)["error"]
    assert error["code"] == "internal"
    log = Path(error["details"]["log_file"])
    assert log.parent == tmp_path / "logs"
    assert "RuntimeError: unforeseen" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["unknown"], "No such command 'unknown'"),
        (["list", "--format", "yaml"], "'yaml' is not one of 'table', 'json'"),
        (["list", "--nonsense"], "--nonsense"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "--help`" in err


def test_a_usage_error_in_json_mode_is_an_envelope(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--format", "json", "--nonsense") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("interrupt") == 130
    assert capsys.readouterr().out == ""


def test_passwords_in_urls_are_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert hide_passwords("git clone https://me:secret@host/x") == "git clone https://me:***@host/x"
    assert hide_passwords("http://127.0.0.1:5072/docs and a@b") == "http://127.0.0.1:5072/docs and a@b"
    print_facts([("repository", "https://me:secret@host/x"), ("empty", "")])
    assert capsys.readouterr().out == "repository  https://me:***@host/x\n"


def test_no_rows_say_so_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["A"], [], empty="Nothing yet.")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "Nothing yet.\n")


def test_a_reader_that_goes_away_is_no_crash() -> None:
    code = (
        "import sys; from pathlib import Path; from flops.cli.output import run_app;"
        "from tests.unit.cli.test_output import app;"
        "sys.exit(run_app(app, ['many'], prog_name='tool', log_folder=Path('/nonexistent')))"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=20) == 141
