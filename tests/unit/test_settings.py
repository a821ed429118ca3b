from __future__ import annotations

from pathlib import Path

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.settings import ControlSettings, arguments_of


def test_a_process_reads_what_it_is_started_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLOPS_MANAGER_PORT", "1")
    monkeypatch.setenv("FLOPS_CLUSTER_PORT", "2")
    given = {"home": tmp_path / "a=b", "manager_port": 3, "cluster_port": None}
    settings = ControlSettings.from_arguments(arguments_of(given))
    assert (settings.home, settings.manager_port, settings.cluster_port) == (tmp_path / "a=b", 3, 2)


def test_what_a_process_cannot_use_is_named() -> None:
    with pytest.raises(FlopsError, match="FLOPS_MANAGER_PORT is 'x'") as caught:
        ControlSettings.from_arguments(["--manager-port=x"])
    assert caught.value.code is ErrorCode.CONFIG_INVALID
