from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.node.home import keep_node_id, only_daemon, running_pid


def test_one_daemon_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "home/nodeengine.pid"
    assert running_pid(file) is None
    with only_daemon(file):
        assert running_pid(file) == os.getpid()
        with pytest.raises(FlopsError) as caught, only_daemon(file):
            pass
        assert caught.value.code is ErrorCode.ALREADY_RUNNING
        assert str(os.getpid()) in caught.value.message
        assert running_pid(file) == os.getpid()
    assert running_pid(file) is None
    with only_daemon(file):
        pass


def test_a_file_that_a_killed_daemon_left_is_no_daemon(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text("1\n")
    assert running_pid(tmp_path / "pid") is None


def test_looking_is_never_in_the_way(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    file.touch()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            running_pid(file)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(500):
            with only_daemon(file):
                pass
    finally:
        is_over.set()
        thread.join()


def test_the_id_stays(tmp_path: Path) -> None:
    first = keep_node_id(tmp_path / "node_id")
    assert keep_node_id(tmp_path / "node_id") == first
    assert keep_node_id(tmp_path / "other") != first


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FlopsError) as caught, only_daemon(tmp_path / "file/home/pid"):
        pass
    assert caught.value.code is ErrorCode.FILE_UNREADABLE
