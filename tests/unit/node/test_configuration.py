from __future__ import annotations

import pytest

from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import (
    NodeConfiguration,
    check_configuration,
    default_configuration,
    find_addon,
    parse_address,
    parse_switch,
)

ANCESTOR = {
    "conf_version": "1.0",
    "cluster_address": "0.0.0.0",  # noqa: S104 (what the file holds)
    "cluster_ssl": False,
    "cluster_port": 10100,
    "app_logs": "/tmp",
    "overlay_network": "default",
    "public_ip": False,
    "overlay_network_port": 0,
    "mqtt_cert_file": "",
    "mqtt_key_file": "",
    "addons": None,
    "virtualizations": [
        {
            "virutalizaiton_name": "containerd",
            "virutalizaiton_runtime": "docker",
            "virutalizaiton_active": True,
            "virutalizaiton_config": [],
        }
    ],
    "csi_drivers": None,
}


def test_the_ancestors_file_is_read() -> None:
    conf = check_configuration(ANCESTOR)
    assert conf.cluster == "127.0.0.1:10100"
    assert conf.addons == {}
    assert conf.virtualizations == {"containerd": True}
    assert set(default_configuration().raw) == set(ANCESTOR)


def test_an_addon_is_switched_and_the_rest_is_kept() -> None:
    conf = NodeConfiguration({**ANCESTOR, "mine": 1}).with_addon(LEARNER_ADDON, is_on=True)
    assert conf.addons == {LEARNER_ADDON: True}
    assert conf.raw["addons"] == [{"addon_name": LEARNER_ADDON, "addon_active": True, "addon_config": []}]
    conf = conf.with_addon(IMAGE_BUILDER_ADDON, is_on=True).with_addon(LEARNER_ADDON, is_on=False)
    assert conf.addons == {LEARNER_ADDON: False, IMAGE_BUILDER_ADDON: True}
    assert conf.active_addons == (IMAGE_BUILDER_ADDON,)
    assert conf.raw["mine"] == 1


@pytest.mark.parametrize(
    "raw",
    [
        [],
        None,
        {"cluster_port": "10100"},
        {"cluster_port": True},
        {"cluster_port": 70000},
        {"cluster_address": 5},
        {"addons": {}},
        {"addons": [{"name": "x"}]},
        {"addons": ["FLOps-learner"]},
    ],
)
def test_what_cannot_be_used_is_corrupt(raw: object) -> None:
    with pytest.raises(FlopsError) as caught:
        check_configuration(raw)
    assert caught.value.code in {ErrorCode.CONFIG_CORRUPT, ErrorCode.CONFIG_INVALID}


@pytest.mark.parametrize("word", ["on", "ON", "enable", "true", " True "])
def test_on(word: str) -> None:
    assert parse_switch(word, "x") is True


@pytest.mark.parametrize("word", ["off", "Off", "disable", "false"])
def test_off(word: str) -> None:
    assert parse_switch(word, "x") is False


@pytest.mark.parametrize("word", ["", "yes", "1", "of", "onn"])
def test_anything_else_is_an_error(word: str) -> None:
    with pytest.raises(FlopsError) as caught:
        parse_switch(word, "x")
    assert caught.value.code is ErrorCode.CONFIG_INVALID


@pytest.mark.parametrize("name", ["FLOps", "FLOps-learner", "flops-learner"])
def test_names_of_the_learner(name: str) -> None:
    assert find_addon(name) == LEARNER_ADDON


@pytest.mark.parametrize("name", ["imageBuilder", "image-builder"])
def test_names_of_the_image_builder(name: str) -> None:
    assert find_addon(name) == IMAGE_BUILDER_ADDON


def test_an_unknown_addon_is_an_error() -> None:
    with pytest.raises(FlopsError) as caught:
        find_addon("flop")
    assert caught.value.code is ErrorCode.ADDON_UNKNOWN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cluster.example", ("cluster.example", None)),
        ("10.0.0.1:123", ("10.0.0.1", 123)),
        ("[::1]:123", ("::1", 123)),
        ("fe80::1", ("fe80::1", None)),
        ("a", ("a", None)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int | None]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "-x", "a b", "http://x", "x:0", "x:65536", "x:y", "a/b", "a;b", "x" * 300]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(FlopsError) as caught:
        parse_address(text)
    assert caught.value.code is ErrorCode.CONFIG_INVALID


def test_an_ipv6_cluster_is_written_in_brackets() -> None:
    assert NodeConfiguration({"cluster_address": "::1"}).cluster == "[::1]:10100"
