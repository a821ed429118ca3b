"""Children that run the user's code, and what is told when they fail."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.testing.waiting import until
from flops.trainer.model_process import ModelProcess


def start(program: str, **options: object) -> ModelProcess:
    return ModelProcess(
        [sys.executable, "-c", program],
        {},
        doing="does it",
        code=ErrorCode.MODEL_EXPORT_FAILED,
        **options,  # type: ignore[arg-type]
    )


def test_success_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    ended = threading.Event()
    child = start("import sys; print('out'); print('note', file=sys.stderr)", on_end=ended.set)
    child.wait()
    child.kill()
    assert ended.wait(5)
    assert not child.has_failed
    assert capfd.readouterr() == ("out\n", "note\n")


def test_the_childs_own_error_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    raw = FlopsError(ErrorCode.USER_CODE_FAILED, "It broke.", details={"traceback": "line 3"}).to_dict()
    child = start(
        f"import json, sys; sys.stderr.write('note\\n' + json.dumps({raw!r}) + '\\n'); sys.exit(40)"
    )
    with pytest.raises(FlopsError) as caught:
        child.wait()
    child.kill()
    assert child.has_failed
    assert (caught.value.code, caught.value.details) == (ErrorCode.USER_CODE_FAILED, {"traceback": "line 3"})
    assert capfd.readouterr().err == "note\n"


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("raise KeyError('x')", ErrorCode.MODEL_EXPORT_FAILED, "that does it ended with"),
        ("import os; os.kill(os.getpid(), 9)", ErrorCode.MODEL_EXPORT_FAILED, "was killed twice"),
        ("import sys; sys.stderr.write('[1]\\n'); sys.exit(3)", ErrorCode.MODEL_EXPORT_FAILED, "ended with"),
    ],
)
def test_an_end_without_a_word_is_told(program: str, code: ErrorCode, message: str) -> None:
    child = start(program)
    with pytest.raises(FlopsError) as caught:
        child.wait()
    child.kill()
    assert caught.value.code is code
    assert message in caught.value.message
    assert "exit_code" in caught.value.details


def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = start(
        f"import os, pathlib; mark = pathlib.Path({str(mark)!r}); first = not mark.exists(); mark.touch()\n"
        "if first: os.kill(os.getpid(), 9)"
    )
    child.wait()
    child.kill()
    assert not child.has_failed


WARM = "import pathlib, sys; path, text = sys.stdin.read().split(); pathlib.Path(path).write_text(text)"


def test_a_warm_child_waits_for_its_orders(tmp_path: Path) -> None:
    child = start(WARM, is_warm=True)
    child.order(str(tmp_path / "out"), "done")
    child.wait()
    assert (tmp_path / "out").read_text() == "done"
    child.kill()


def test_a_warm_child_that_is_killed_gets_its_orders_again(tmp_path: Path) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    child = start(
        f"import os, pathlib; mark = pathlib.Path({str(mark)!r}); first = not mark.exists()\n"
        f"if first: import sys; sys.stdin.read(); mark.touch(); os.kill(os.getpid(), 9)\n{WARM}",
        is_warm=True,
    )
    child.order(str(out), "done")
    child.wait()
    assert out.read_text() == "done"
    child.kill()


def test_a_warm_child_that_is_killed_before_it_has_orders_is_there_when_they_come(tmp_path: Path) -> None:
    mark, out = tmp_path / "mark", tmp_path / "out"
    child = start(
        f"import os, pathlib; mark = pathlib.Path({str(mark)!r}); first = not mark.exists()\n"
        f"mark.touch()\nif first: os.kill(os.getpid(), 9)\n{WARM}",
        is_warm=True,
    )
    until(mark.exists)
    child.order(str(out), "done")
    child.wait()
    assert out.read_text() == "done"
    child.kill()


def test_a_warm_child_that_nobody_wants_any_more_ends() -> None:
    child = start("import sys; sys.stdin.read()", is_warm=True)
    child.kill()
    assert child.has_failed


def test_a_program_that_is_not_there_is_told() -> None:
    with pytest.raises(FlopsError) as caught:
        ModelProcess(["/no/python"], {}, doing="does it", code=ErrorCode.USER_CODE_FAILED)
    assert caught.value.code is ErrorCode.USER_CODE_FAILED
    assert "cannot be started" in caught.value.message


def test_a_child_can_be_ended() -> None:
    child = start("import time; time.sleep(60)")
    child.kill()
    assert child.has_failed


def test_what_does_not_end_is_killed() -> None:
    child = start("while True: pass")
    with pytest.raises(FlopsError, match=r"that does it did not end within 0\.2 s") as caught:
        child.wait(0.2)
    assert caught.value.code is ErrorCode.MODEL_EXPORT_FAILED
