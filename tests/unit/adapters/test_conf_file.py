from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from flops.adapters.conf_file import ConfFile
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import check_configuration, default_configuration


@pytest.fixture
def conf(tmp_path: Path) -> ConfFile:
    return ConfFile(
        tmp_path / "etc/conf.json", lambda: dict(default_configuration().raw), check_configuration
    )


def test_without_a_file_there_are_defaults(conf: ConfFile) -> None:
    assert conf.load() == default_configuration().raw
    assert not conf.path.exists()


def test_unknown_keys_are_kept(conf: ConfFile) -> None:
    conf.reset()
    conf.path.write_text(json.dumps({**conf.load(), "mine": [1, {"ü": 2}]}))
    conf.update(lambda raw: {**raw, "cluster_address": "c"})
    assert conf.load()["mine"] == [1, {"ü": 2}]
    assert conf.load()["cluster_address"] == "c"
    assert conf.path.stat().st_mode & 0o777 == 0o644


def test_a_long_file_is_read_whole(conf: ConfFile) -> None:
    conf.reset()
    conf.update(lambda raw: {**raw, "mine": "x" * 100_000})
    assert len(conf.load()["mine"]) == 100_000


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"cluster_port": "x"}', '{"cluster_port": 0', "\x00"]
)
def test_a_corrupt_file_is_told_and_left_alone(conf: ConfFile, text: str) -> None:
    conf.reset()
    conf.path.write_text(text)
    for act in (conf.load, lambda: conf.update(lambda raw: raw)):
        with pytest.raises(FlopsError) as caught:
            act()
        assert caught.value.code is ErrorCode.CONFIG_CORRUPT
        assert str(conf.path) in caught.value.message
    assert conf.path.read_text() == text
    conf.reset()
    assert conf.load() == default_configuration().raw


def test_bytes_that_are_no_text_are_corrupt(conf: ConfFile) -> None:
    conf.reset()
    conf.path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(FlopsError) as caught:
        conf.load()
    assert caught.value.code is ErrorCode.CONFIG_CORRUPT


def test_a_change_that_fails_changes_nothing(conf: ConfFile) -> None:
    conf.reset()
    before = conf.path.read_bytes()

    def fail(_raw: dict[str, Any]) -> dict[str, Any]:
        raise FlopsError(ErrorCode.CONFIG_INVALID, "no")

    with pytest.raises(FlopsError):
        conf.update(fail)
    assert conf.path.read_bytes() == before
    assert [path.name for path in conf.path.parent.iterdir()] == ["conf.json"]


def test_no_change_is_lost(conf: ConfFile) -> None:
    conf.reset()
    conf.update(lambda raw: {**raw, "count": 0})

    def count() -> None:
        for _ in range(20):
            conf.update(lambda raw: {**raw, "count": raw["count"] + 1})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert conf.load()["count"] == 80


def test_a_folder_in_its_place_is_told(conf: ConfFile) -> None:
    conf.path.mkdir(parents=True)
    with pytest.raises(FlopsError) as caught:
        conf.load()
    assert caught.value.code is ErrorCode.FILE_UNREADABLE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_ours_is_told(conf: ConfFile) -> None:
    conf.path.parent.mkdir(mode=0o500)
    with pytest.raises(FlopsError) as caught:
        conf.reset()
    assert caught.value.code is ErrorCode.FILE_UNREADABLE
