"""`flops` and a manager that encrypts: connecting, and everything that is refused."""

from __future__ import annotations

import hashlib
import ssl
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flops.adapters.certificates import FileAuthority
from flops.adapters.system_clock import SystemClock
from flops.errors import CATALOGUE, ErrorCode, FlopsError
from flops.testing.projects import played_cluster
from flops.testing.waiting import until
from flops.wire.cluster_tls import MANAGER_NAME
from flops.wire.token_text import read_line, write_line
from flops.wiring.server_certificate import given_certificate, signed_certificate

from .conftest import TOKEN, Flops, Manager

LINE = "flopsc1."


@pytest.fixture
def authority(tmp_path: Path) -> FileAuthority:
    return FileAuthority(tmp_path / "authority.pem", time.time())


@pytest.fixture
def safe(tmp_path: Path, authority: FileAuthority) -> Iterator[Manager]:
    """A manager that encrypts."""
    identity = tmp_path / "manager.pem"
    certificate = signed_certificate(authority, identity, MANAGER_NAME, SystemClock(), 3600.0)
    with played_cluster() as cluster:
        manager = Manager(cluster, certificate.tls, authority.pem)
        yield manager
        cluster.engine.close()
        manager.stop()


def line_to(url: str, authority: FileAuthority, token: str = TOKEN) -> str:
    return write_line(LINE, url, authority.fingerprint, token)


def exit_code(code: ErrorCode) -> int:
    return CATALOGUE[code].exit_code


def test_a_line_connects_this_machine_for_good(
    safe: Manager, authority: FileAuthority, command: Flops, tmp_path: Path
) -> None:
    assert command("node", "list").exit_code == exit_code(ErrorCode.UNREACHABLE)
    made = command("connect", line_to(safe.url, authority))
    assert made.exit_code == 0, made.err
    kept = tmp_path / "home" / "connection.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert TOKEN not in made.out + made.err
    assert len(command("node", "list", "--format", "json").data) == 2
    findings = command("doctor", "--format", "json").data["findings"]
    assert [f["severity"] for f in findings if f["check"] == "control plane"] == ["ok"]
    assert [f for f in findings if f["check"] == "clock"]
    assert not [f for f in findings if f["check"] == "ports"]  # those of the other machine
    assert command("disconnect").exit_code == 0
    assert command("node", "list").exit_code == exit_code(ErrorCode.UNREACHABLE)
    assert command("disconnect").exit_code == exit_code(ErrorCode.NOT_FOUND)


class _Late(SystemClock):
    """So late that a certificate of an hour that it signs has ten minutes left."""

    def now_s(self) -> float:
        return super().now_s() - 3_000.0


def test_the_doctor_sees_a_certificate_that_was_not_renewed(
    safe: Manager, authority: FileAuthority, command: Flops, tmp_path: Path
) -> None:
    command("connect", line_to(safe.url, authority))

    def certificates() -> list[str]:
        findings = command("doctor", "--format", "json").data["findings"]
        return [f["severity"] for f in findings if f["check"] == "certificate"]

    assert certificates() == ["ok"]
    signed_certificate(authority, tmp_path / "late.pem", MANAGER_NAME, _Late(), 3_600.0)
    assert safe.tls is not None
    safe.tls.load_cert_chain(tmp_path / "late.pem")
    assert certificates() == ["warning"]


def test_the_line_is_made_from_what_this_machine_is_connected_by(
    safe: Manager, authority: FileAuthority, command: Flops
) -> None:
    command("connect", line_to(safe.url, authority))
    refused = command("status", "--connect")
    assert refused.exit_code == exit_code(ErrorCode.CONFLICT)  # it listens on loopback
    assert "--host" in refused.err
    made = command("status", "--connect", "--address", "fl.example.org")
    url = f"https://fl.example.org:{safe.port}"
    assert read_line(LINE, made.out) == [url, authority.fingerprint, TOKEN]


def test_the_manager_is_known_at_any_address_by_the_file_of_its_authority(
    safe: Manager, authority: FileAuthority, command: Flops, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "authority.crt").write_text(authority.pem)
    known = ["--url", safe.url, "--token-file", tmp_path / "token"]
    assert command(*known, "--authority-file", tmp_path / "authority.crt", "status").exit_code == 0
    stranger = command(*known, "status")
    assert stranger.exit_code == exit_code(ErrorCode.CERTIFICATE_REFUSED)
    assert "--authority-file" in stranger.err
    (tmp_path / "authority.crt").write_text("no certificate")
    damaged = command(*known, "--authority-file", tmp_path / "authority.crt", "status")
    assert damaged.exit_code == exit_code(ErrorCode.FILE_UNREADABLE)
    missing = command(*known, "--authority-file", tmp_path / "nowhere", "status")
    assert missing.exit_code == exit_code(ErrorCode.FILE_UNREADABLE)


def test_nothing_is_told_to_a_manager_that_is_not_the_one_of_the_line(
    safe: Manager, command: Flops, tmp_path: Path
) -> None:
    other = FileAuthority(tmp_path / "other.pem", time.time())
    refused = command("connect", line_to(safe.url, other))
    assert refused.exit_code == exit_code(ErrorCode.CERTIFICATE_REFUSED)
    assert "nothing was sent" in refused.err
    assert not (tmp_path / "home" / "connection.json").exists()


def test_a_wrong_token_and_half_a_line_are_refused(
    safe: Manager, authority: FileAuthority, command: Flops, tmp_path: Path
) -> None:
    wrong = command("connect", line_to(safe.url, authority, "guessed"))
    assert wrong.exit_code == exit_code(ErrorCode.UNAUTHENTICATED)
    for text in ("", "flopsc1.", line_to(safe.url, authority)[:60], "flops1.WyJhIl0", "flopsc1.MQ"):
        half = command("connect", text)
        assert half.exit_code == exit_code(ErrorCode.USAGE), text
        assert "whole line" in half.err
    assert not (tmp_path / "home" / "connection.json").exists()


def test_a_damaged_connection_is_named(command: Flops, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "connection.json").write_text("{")
    assert command("node", "list").exit_code == exit_code(ErrorCode.FILE_UNREADABLE)


def test_plaintext_to_a_manager_that_encrypts_is_told(safe: Manager, command: Flops, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    url = safe.url.replace("https", "http")
    refused = command("--url", url, "--token-file", tmp_path / "token", "status")
    assert refused.exit_code == exit_code(ErrorCode.ENCRYPTION_MISMATCH)
    assert "encrypts" in refused.err


def test_tls_to_a_manager_that_does_not_encrypt_is_told(
    manager: Manager, authority: FileAuthority, command: Flops
) -> None:
    refused = command("connect", line_to(manager.url.replace("http", "https"), authority))
    assert refused.exit_code == exit_code(ErrorCode.ENCRYPTION_MISMATCH)


@pytest.mark.parametrize("way", ["url", "line"])
def test_the_token_goes_to_no_other_machine_in_the_clear_unless_told_so(
    command: Flops, tmp_path: Path, way: str
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    url = "http://192.0.2.77:5072"  # a machine that there is not
    asked = ["--url", url, "--token-file", tmp_path / "token", "status"]
    asked = asked if way == "url" else ["connect", write_line(LINE, url, "", TOKEN)]
    refused = command(*asked)
    assert refused.exit_code == exit_code(ErrorCode.ENCRYPTION_MISMATCH)
    assert "--insecure" in refused.err


def test_insecure_connects_in_the_clear(manager: Manager, command: Flops) -> None:
    assert command("--insecure", "connect", write_line(LINE, manager.url, "", TOKEN)).exit_code == 0
    assert len(command("node", "list", "--format", "json").data) == 2


# The operator's own certificate


def make_own(folder: Path, name: str) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    request += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", f"/CN={name}"]
    subprocess.run([*request, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return certificate, key


def shown_by(port: int) -> str:
    try:
        pem = ssl.get_server_certificate(("127.0.0.1", port))
    except ssl.SSLError:
        return ""  # while OpenSSL has the new certificate and not yet its key
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def test_an_own_certificate_is_shown_and_replaced_while_it_runs(tmp_path: Path) -> None:
    certificate, key = make_own(tmp_path, "first")
    second = make_own(tmp_path, "second")
    given = given_certificate(certificate, key, look_s=0.1)
    given.start()
    with played_cluster() as cluster:
        manager = Manager(cluster, given.tls)
        try:
            assert httpx.get(manager.url, verify=ssl.create_default_context(cafile=certificate)).is_success
            first = shown_by(manager.port)
            certificate.write_text(second[0].read_text())  # the key is still the old one
            time.sleep(0.3)  # several looks
            assert shown_by(manager.port) == first
            key.write_text(second[1].read_text())
            until(lambda: shown_by(manager.port) not in {first, ""}, "the new certificate")
        finally:
            given.close()
            cluster.engine.close()
            manager.stop()


def test_an_own_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    certificate, _ = make_own(tmp_path, "first")
    _, foreign = make_own(tmp_path, "second")
    locked = tmp_path / "locked.key"
    lock = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run([*lock, "-in", str(tmp_path / "first.key")], check=True, capture_output=True)
    for key in (foreign, locked, None, tmp_path / "nowhere"):
        with pytest.raises(FlopsError) as caught:
            given_certificate(certificate, key)
        assert caught.value.code is ErrorCode.CONFIG_INVALID
        assert str(certificate) in caught.value.message
