"""Which cluster a node joins, and how: what the options of ``NodeEngine`` say, kept for later starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flops.cli.node_config import change_configuration, cluster_of, load_configuration
from flops.cli.output import say

if TYPE_CHECKING:
    from flops.node.paths import NodePaths


@dataclass(frozen=True)
class Joining:
    """What was given.

    Args:
        address: of the cluster; None for the one it had.
        port: of the cluster, likewise.
        token: to join by.
        is_insecure: whether to do without encryption, also to another machine.
    """

    address: str | None
    port: int | None
    token: str | None
    is_insecure: bool


def keep_cluster(paths: NodePaths, joining: Joining) -> None:
    """Join by the token, if one is given, and store what was given; also writes a first configuration.

    Raises:
        FlopsError: ``config_invalid``, ``config_corrupt``, ``usage``, ``join_refused``,
            ``certificate_refused``, ``encryption_mismatch``, ``unreachable``.
    """
    from flops.node.configuration import check_port

    values: dict[str, str | int | bool] = {}
    address, port = joining.address, joining.port
    if joining.token is not None:
        address, port = _join(paths, joining.token, address, port)
        values["cluster_insecure"] = False
    if address is not None:
        host, port = cluster_of(address, port)
        values["cluster_address"] = host
    if port is not None:
        values["cluster_port"] = check_port(port)
    if joining.is_insecure:
        values["cluster_insecure"] = True
        say("Warning: the connection to the cluster will not be encrypted; others can read and change it.")
    if values or not paths.conf.exists():
        change_configuration(paths, lambda conf: conf.with_values(**values))
    else:
        load_configuration(paths)


def _join(paths: NodePaths, text: str, address: str | None, port: int | None) -> tuple[str, int]:
    """Have the cluster sign a certificate; returns the cluster's host and port."""
    from flops.adapters.node_identity import join_cluster
    from flops.node.configuration import DEFAULT_CLUSTER_PORT, parse_address
    from flops.node.home import keep_node_id
    from flops.wire.join import JoinToken

    token = JoinToken.parse(text)
    host, told_port = parse_address(token.cluster)
    if address is not None:
        host, port = cluster_of(address, port)
    port = port or told_port or DEFAULT_CLUSTER_PORT
    conf = load_configuration(paths).with_values(cluster_address=host, cluster_port=port)
    paths.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = join_cluster(
        paths.identity, token, conf.cluster, keep_node_id(paths.node_id), conf.active_addons
    )
    say(f"{identity.signer} has signed this node's certificate.")
    return host, port
