"""Credentials of registries, from files as docker and podman write them."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import httpx
import pytest

from flops.adapters.registry_client.auth import Credentials, DockerCredentials, RegistryAuth
from flops.errors import ErrorCode, FlopsError


def entry(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_credentials_are_found_by_the_longest_part_of_the_name(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    auths = {
        "https://docker.example/v1/": entry("a:1"),
        "reg.example:5000": entry("b:2:3"),
        "reg.example:5000/team": {"username": "c", "password": "4"},
        "reg.example:5000/team/robot": {"auth": "", "identitytoken": "t"},
        "empty.example": {},
    }
    file.write_text(json.dumps({"auths": auths, "credsStore": "desktop"}))
    found = DockerCredentials.load(file).find
    assert found("docker.example", "x") == Credentials("a", "1")
    assert found("reg.example:5000", "x") == Credentials("b", "2:3")
    assert found("reg.example:5000", "teams/x") == Credentials("b", "2:3")
    assert found("reg.example:5000", "team/x") == Credentials("c", "4")
    assert found("reg.example:5000", "team/robot/x") == Credentials("", "t")
    assert found("empty.example", "x") is None
    assert found("reg.example", "x") is None


def test_a_password_is_not_shown() -> None:
    assert "secret" not in repr(Credentials("me", "secret"))


def test_a_file_that_is_not_there_has_no_credentials(tmp_path: Path) -> None:
    assert DockerCredentials.load(tmp_path / "none.json").find("a.example", "b") is None


@pytest.mark.parametrize("text", ["", "[]", '{"auths": {"a": {"auth": "%"}}}', '{"auths": {"a": "b"}}'])
def test_a_damaged_file_is_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(FlopsError) as caught:
        DockerCredentials.load(file)
    assert caught.value.code is ErrorCode.CONFIG_CORRUPT
    assert str(file) in caught.value.message


ORIGIN = httpx.URL("https://reg.example")


def answer(auth: RegistryAuth, url: str, challenge: str) -> list[httpx.Request]:
    """What is sent, when everything is answered with this challenge."""
    flow = auth.sync_auth_flow(httpx.Request("GET", url))
    sent = [next(flow)]
    headers = {"www-authenticate": challenge}
    while True:
        try:
            sent.append(flow.send(httpx.Response(401, headers=headers, request=sent[-1])))
        except StopIteration:
            return sent


def test_credentials_go_to_the_registry_alone() -> None:
    for url in ("https://cdn.example/x", "http://reg.example/x", "https://reg.example:444/x"):
        (sent,) = answer(RegistryAuth(ORIGIN, Credentials("me", "pw")), url, 'Basic realm="x"')
        assert "authorization" not in sent.headers
    sent_to_it = answer(
        RegistryAuth(ORIGIN, Credentials("me", "pw")), "https://reg.example/x", 'Basic realm="x"'
    )
    assert sent_to_it[-1].headers["authorization"] == Credentials("me", "pw").basic


def test_credentials_are_not_sent_in_the_clear_for_a_token() -> None:
    with pytest.raises(FlopsError) as caught:
        answer(
            RegistryAuth(ORIGIN, Credentials("me", "pw")),
            "https://reg.example/x",
            'Bearer realm="http://tokens.example"',
        )
    assert caught.value.code is ErrorCode.REGISTRY_REFUSED
    assert "tokens.example" in caught.value.message


@pytest.mark.parametrize("challenge", ["", "Negotiate", "Basic", 'Digest realm="x"'])
def test_who_has_no_answer_asks_once(challenge: str) -> None:
    assert len(answer(RegistryAuth(ORIGIN, None), "https://reg.example/x", challenge)) == 1
