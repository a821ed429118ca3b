"""What an operator configures for good, in the format of the ancestor's ``conf.json``: rules, no I/O."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flops.core.address import with_port
from flops.core.cluster import IMAGE_BUILDER_ADDON, LEARNER_ADDON
from flops.disclosure import Disclosure
from flops.errors import ErrorCode, FlopsError

DEFAULT_CLUSTER_PORT = 10_100
ADDON_NAMES = {
    "flops-learner": LEARNER_ADDON,
    "flops": LEARNER_ADDON,
    "image-builder": IMAGE_BUILDER_ADDON,
    "imagebuilder": IMAGE_BUILDER_ADDON,
}
PROCESS = "process"
CONTAINER = "container"
DISCLOSURE_KEY = "failure_disclosure"
_ON = frozenset({"on", "enable", "true"})
_OFF = frozenset({"off", "disable", "false"})
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|\[?[0-9a-fA-F:]*:[0-9a-fA-F:.]*\]?")


@dataclass(frozen=True)
class NodeConfiguration:
    """A node's configuration; unknown keys of the file are kept as they are.

    Args:
        raw: the content of ``conf.json``.
    """

    raw: Mapping[str, Any]

    @property
    def cluster_address(self) -> str:
        """Host name or address to dial; this machine unless configured."""
        address = str(self.raw.get("cluster_address") or "0.0.0.0")  # noqa: S104 (the format's default)
        return "127.0.0.1" if address == "0.0.0.0" else address  # noqa: S104 (not bound, dialled)

    @property
    def cluster_port(self) -> int:
        """Port to dial."""
        return int(self.raw.get("cluster_port") or DEFAULT_CLUSTER_PORT)

    @property
    def is_cluster_tls(self) -> bool:
        """Whether the cluster is dialled by TLS."""
        return bool(self.raw.get("cluster_ssl"))

    @property
    def is_insecure(self) -> bool:
        """Whether a cluster on another machine may be spoken to without encryption."""
        return bool(self.raw.get("cluster_insecure"))

    @property
    def cluster(self) -> str:
        """``host:port`` of the cluster."""
        return with_port(self.cluster_address, self.cluster_port)

    @property
    def app_logs(self) -> str:
        """Folder of the services' output; "" for the node's own."""
        return str(self.raw.get("app_logs") or "")

    @property
    def is_public(self) -> bool:
        """Whether services are announced under the machine's public address, if it has one."""
        return bool(self.raw.get("public_ip"))

    @property
    def disclosure(self) -> Disclosure:
        """What the node reveals about failures of users' code; everything unless configured."""
        return Disclosure(self.raw.get(DISCLOSURE_KEY) or Disclosure.FULL)

    @property
    def client_certificate(self) -> tuple[str, str]:
        """Paths of certificate and key to show to the cluster; "" when there is none."""
        return str(self.raw.get("mqtt_cert_file") or ""), str(self.raw.get("mqtt_key_file") or "")

    @property
    def addons(self) -> dict[str, bool]:
        """Each configured addon, and whether it is on."""
        return {str(a["addon_name"]): bool(a.get("addon_active")) for a in self.raw.get("addons") or ()}

    @property
    def active_addons(self) -> tuple[str, ...]:
        """The addons that are on."""
        return tuple(name for name, is_on in self.addons.items() if is_on)

    @property
    def virtualizations(self) -> dict[str, bool]:
        """Each configured way to run services, and whether it is on. (The key's typos are the format's.)"""
        return {
            str(v["virutalizaiton_name"]): bool(v.get("virutalizaiton_active"))
            for v in self.raw.get("virtualizations") or ()
        }

    @property
    def prefers_containers(self) -> bool:
        """Whether services run in containers where they can."""
        return self.virtualizations.get(CONTAINER, False)

    def with_values(self, **values: Any) -> NodeConfiguration:
        """A configuration with some keys changed."""
        return NodeConfiguration({**copy.deepcopy(dict(self.raw)), **values})

    def with_addon(self, name: str, *, is_on: bool) -> NodeConfiguration:
        """A configuration with an addon switched on or off."""
        addons = copy.deepcopy(list(self.raw.get("addons") or ()))
        for addon in addons:
            if addon["addon_name"] == name:
                addon["addon_active"] = is_on
                return self.with_values(addons=addons)
        return self.with_values(
            addons=[*addons, {"addon_name": name, "addon_active": is_on, "addon_config": []}]
        )

    def with_containers(self, *, is_on: bool) -> NodeConfiguration:
        """A configuration with containers switched on or off."""
        entries = copy.deepcopy(list(self.raw.get("virtualizations") or ()))
        for entry in entries:
            if entry["virutalizaiton_name"] == CONTAINER:
                entry["virutalizaiton_active"] = is_on
                return self.with_values(virtualizations=entries)
        return self.with_values(virtualizations=[*entries, _virtualization(CONTAINER, is_on=is_on)])


def _virtualization(name: str, *, is_on: bool) -> dict[str, Any]:
    return {
        "virutalizaiton_name": name,
        "virutalizaiton_runtime": name,
        "virutalizaiton_active": is_on,
        "virutalizaiton_config": [],
    }


def default_configuration() -> NodeConfiguration:
    """What a new node starts with."""
    return NodeConfiguration(
        {
            "conf_version": "1.0",
            "cluster_address": "0.0.0.0",  # noqa: S104 (the format's "not configured")
            "cluster_ssl": False,
            "cluster_port": DEFAULT_CLUSTER_PORT,
            "app_logs": "",
            "overlay_network": "default",
            "public_ip": False,
            "overlay_network_port": 0,
            "mqtt_cert_file": "",
            "mqtt_key_file": "",
            "addons": None,
            "virtualizations": [_virtualization(PROCESS, is_on=True)],
            "csi_drivers": None,
        }
    )


def check_configuration(raw: object) -> NodeConfiguration:
    """Take a parsed ``conf.json`` for a configuration.

    Raises:
        FlopsError: ``config_corrupt``, naming the key that has another type than it must have.
    """
    if not isinstance(raw, dict):
        raise _corrupt("it is not a JSON object")
    types: dict[str, type | tuple[type, ...]] = {
        "cluster_address": str,
        "cluster_port": int,
        "cluster_ssl": bool,
        "cluster_insecure": bool,
        "app_logs": str,
        "public_ip": bool,
        "mqtt_cert_file": str,
        "mqtt_key_file": str,
        DISCLOSURE_KEY: str,
        "addons": list,
        "virtualizations": list,
    }
    for key, kind in types.items():
        value = raw.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise _corrupt(f"{key} is {value!r}")
    for key, name in (("addons", "addon_name"), ("virtualizations", "virutalizaiton_name")):
        for entry in raw.get(key) or ():
            if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
                raise _corrupt(f"{key} holds {entry!r}, which has no {name}")
    if raw.get(DISCLOSURE_KEY) and raw[DISCLOSURE_KEY] not in set(Disclosure):
        raise _corrupt(f"{DISCLOSURE_KEY} is {raw[DISCLOSURE_KEY]!r}, not one of {', '.join(Disclosure)}")
    if raw.get("cluster_port") is not None:
        check_port(raw["cluster_port"])
    return NodeConfiguration(raw)


def parse_switch(value: str, what: str) -> bool:
    """Read on or off.

    Raises:
        FlopsError: ``config_invalid``.
    """
    lower = value.strip().lower()
    if lower in _ON or lower in _OFF:
        return lower in _ON
    raise FlopsError(
        ErrorCode.CONFIG_INVALID,
        f"{what} cannot be switched to {value!r}.",
        hint="Say on or off (or enable/disable, true/false); nothing was changed.",
    )


def find_addon(name: str) -> str:
    """The addon that a name or an alias means.

    Raises:
        FlopsError: ``addon_unknown``.
    """
    addon = ADDON_NAMES.get(name.strip().lower())
    if addon is None:
        raise FlopsError(ErrorCode.ADDON_UNKNOWN, f"There is no addon {name!r}; nothing was changed.")
    return addon


def parse_address(text: str) -> tuple[str, int | None]:
    """Read the address of a cluster: ``host``, ``host:port``, ``[IPv6]:port``; the port is None if not given.

    Raises:
        FlopsError: ``config_invalid``.
    """
    host, port = text.strip(), None
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", host)
    if found:
        host, port = found[1], check_port(int(found[2]))
    if not _HOST.fullmatch(host):
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"{text!r} is not the address of a cluster.",
            hint="Give a host name or an IP address, such as 192.168.1.10; nothing was changed.",
        )
    return host.strip("[]"), port


def check_port(port: int) -> int:
    """Return a valid TCP port.

    Raises:
        FlopsError: ``config_invalid``.
    """
    if not 1 <= port <= 65_535:
        raise FlopsError(
            ErrorCode.CONFIG_INVALID,
            f"{port} is not a port.",
            hint="Give a number from 1 to 65535; nothing was changed.",
        )
    return port


def _corrupt(why: str) -> FlopsError:
    return FlopsError(ErrorCode.CONFIG_CORRUPT, f"The node's configuration cannot be used: {why}.")
