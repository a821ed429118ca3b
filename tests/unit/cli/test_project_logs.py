"""Following the output of services: each line once, in order, and what is missing is told."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from flops.cli.output import print_line, say
from flops.cli.project_logs import LogPrinter
from flops.core.ids import ServiceId
from flops.wire.rest import ServiceLog

from .conftest import Flops, Manager
from .test_project_commands import meanwhile, submit


def piece(text: str, start: int, *, total: int | None = None, service: str = "s1") -> ServiceLog:
    end = start + len(text.encode())
    return ServiceLog(
        service_id=service,
        kind="learner",
        node="alpha",
        state="running",
        text=text,
        start=start,
        end=end,
        total=end if total is None else total,
    )


def printed(capsys: pytest.CaptureFixture[str], *pieces: ServiceLog) -> str:
    printer = LogPrinter()
    for one in pieces:
        printer.print_news([one])
    printer.finish()
    return capsys.readouterr().out


def test_a_line_in_two_pieces_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, piece("one\ntw", 0), piece("o\n\nthree", 6))
    assert out == "── s1 on alpha\none\ntwo\n\nthree\n"


def test_lines_of_two_services_are_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, piece("a", 0), piece("b\n", 0, service="s2"), piece("a\n", 1))
    assert out == "── s2 on alpha\nb\n── s1 on alpha\naa\n"


def test_what_is_missing_is_counted_with_the_line_it_broke(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, piece("a\nhal", 0), piece("z\n", 1_005))
    assert out == "── s1 on alpha\na\n… 1,003 bytes were dropped by rotation\nz\n"


def test_what_was_before_the_tail_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, piece("z\n", 10)) == "── s1 on alpha\n… 10 bytes before this are not shown\nz\n"


def test_output_that_begins_anew_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, piece("old\nhalf", 0), piece("new\n", 0))
    assert out == "── s1 on alpha\nold\nhalf\n… its output begins anew\nnew\n"


def test_what_a_service_writes_while_it_is_followed_is_shown_once(
    flops: Flops, manager: Manager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project_id = submit(flops, tmp_path)
    cluster = manager.cluster
    cluster.wait(project_id, lambda p: p.placement is not None)
    builder = cluster.wait_for_service(f"builder-{project_id}")
    cluster.orchestrator.logs[builder] = "line 1\nli"
    node = next(n for n in cluster.orchestrator.nodes() if n.name == "alpha")
    shown: dict[str, threading.Event] = {
        text: threading.Event() for text in ("line 1", "line 2", "is away", "does not answer", "line 3")
    }

    def note(text: str) -> None:
        for part, event in shown.items():
            if part in text:
                event.set()

    monkeypatch.setattr("flops.cli.project_logs.print_line", lambda text: (print_line(text), note(text)))
    monkeypatch.setattr("flops.cli.project_logs.say", lambda text: (say(text), note(text)))

    def play() -> None:
        assert shown["line 1"].wait(20)
        cluster.orchestrator.logs[builder] += "ne 2\n"
        assert shown["line 2"].wait(20)
        cluster.orchestrator.leave(node.id)
        assert shown["is away"].wait(20)
        cluster.orchestrator.join(node)
        manager.stop()
        assert shown["does not answer"].wait(20)
        manager.start()
        cluster.orchestrator.logs[builder] += "line 3\nthe end"
        assert shown["line 3"].wait(20)
        cluster.engine.stop(project_id)

    with meanwhile(play):
        followed = flops("project", "logs", project_id, "--follow", "--service", ServiceId(builder))
    assert followed.exit_code == 0, followed.err
    assert followed.out == f"── {builder} on alpha\nline 1\nline 2\nline 3\nthe end\n"
    assert followed.err.count("is away") == 1
    assert followed.err.count("does not answer") == 1
