"""What `flops cluster up` is told, and what it refuses before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flops.cli.relay_join import RelayJoining, keep_relay
from flops.errors import ErrorCode, FlopsError
from flops.relay.configuration import IDENTITY_FILE, RelayConfiguration
from flops.testing.safe_cluster import HOUR_S, SafeCluster
from flops.wire.join import JoinToken

Keep = Callable[..., RelayConfiguration]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "relay"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[SafeCluster]:
    manager = SafeCluster(tmp_path / "manager")
    yield manager
    manager.close()


@pytest.fixture
def keep(folder: Path) -> Keep:
    def keep(
        name: str | None = None,
        manager: str | None = None,
        token: str | None = None,
        is_insecure: bool = False,
    ) -> RelayConfiguration:
        return keep_relay(folder, RelayJoining(name, manager, token, is_insecure=is_insecure))

    return keep


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"manager": "127.0.0.1:1"}, ErrorCode.USAGE),
        ({"name": "edge-a"}, ErrorCode.USAGE),
        ({"name": "default", "manager": "127.0.0.1"}, ErrorCode.USAGE),
        ({"name": "Edge_A", "manager": "127.0.0.1"}, ErrorCode.USAGE),
        ({"name": "a/../b", "manager": "127.0.0.1"}, ErrorCode.USAGE),
        ({"name": "x" * 41, "manager": "127.0.0.1"}, ErrorCode.USAGE),
        ({"name": "edge-a", "token": "flops1.abc"}, ErrorCode.JOIN_REFUSED),
        ({"name": "edge-a", "token": "flops1.abc", "is_insecure": True}, ErrorCode.USAGE),
        ({"name": "edge-a", "manager": "http://192.0.2.1:10100"}, ErrorCode.ENCRYPTION_MISMATCH),
        ({"name": "edge-a", "manager": "ftp://192.0.2.1"}, ErrorCode.USAGE),
        ({"name": "edge-a", "manager": "two words"}, ErrorCode.CONFIG_INVALID),
        ({"name": "edge-a", "manager": "192.0.2.1:99999"}, ErrorCode.CONFIG_INVALID),
    ],
)
def test_what_is_wrong_is_refused_and_leaves_nothing_behind(
    keep: Keep, folder: Path, given: dict[str, str], code: ErrorCode
) -> None:
    with pytest.raises(FlopsError) as caught:
        keep(**given)
    assert caught.value.code is code
    assert caught.value.hint
    assert not folder.exists()


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("127.0.0.1:20100", "127.0.0.1:20100"),
        ("http://localhost:20100", "localhost:20100"),
        ("https://fl.example.org", "fl.example.org:10100"),
        ("https://[fd00::1]:7/", "[fd00::1]:7"),
    ],
)
def test_a_manager_is_named_by_its_address_with_or_without_a_scheme(
    keep: Keep, folder: Path, given: str, stored: str
) -> None:
    kept = keep("edge-a", given)
    assert (kept.manager, kept.is_insecure) == (stored, False)
    assert RelayConfiguration.load(folder) == kept
    assert keep() == kept
    with pytest.raises(FlopsError, match="is edge-a, not edge-b") as caught:
        keep("edge-b")
    assert caught.value.code is ErrorCode.CONFLICT


def test_a_token_says_where_the_manager_is_and_is_kept_as_an_identity(
    keep: Keep, folder: Path, manager: SafeCluster
) -> None:
    invite = manager.security.admission.invite_relay
    token = invite("192.0.2.1:1", "edge-a", for_s=HOUR_S).text()
    with pytest.raises(FlopsError) as caught:
        keep("edge-b", manager.address, token)
    assert caught.value.code is ErrorCode.JOIN_REFUSED
    assert not (folder / IDENTITY_FILE).exists()
    unknown = JoinToken.parse(token).model_copy(update={"secret": "guessed"}).text()
    with pytest.raises(FlopsError) as caught:
        keep("edge-a", manager.address, unknown)
    assert "flops cluster invite edge-a" in caught.value.hint
    kept = keep("edge-a", f"https://{manager.address}", token)
    assert kept.manager == manager.address
    identity = (folder / IDENTITY_FILE).read_text()
    with pytest.raises(FlopsError) as caught:
        keep("edge-a", manager.address, token)  # typed again
    assert "without --token" in caught.value.hint
    assert (folder / IDENTITY_FILE).read_text() == identity


def test_what_is_kept_and_cannot_be_read_is_said_so(keep: Keep, folder: Path) -> None:
    keep("edge-a", "127.0.0.1:1")
    (folder / "relay.json").write_text("{")
    with pytest.raises(FlopsError) as caught:
        keep()
    assert caught.value.code is ErrorCode.CONFIG_CORRUPT
