"""Which cluster a relay runs, and for which manager: what ``flops cluster up`` was told, kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flops.cli.output import say
from flops.core.address import with_port
from flops.core.clusters import check_cluster_name
from flops.core.health import is_loopback
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import DEFAULT_CLUSTER_PORT, parse_address
from flops.relay.configuration import IDENTITY_FILE, RelayConfiguration
from flops.wire.join import JoinToken


@dataclass(frozen=True)
class RelayJoining:
    """What was given; None is "not given".

    Args:
        name: of the cluster.
        manager: its address, with or without a scheme.
        token: to join by.
        is_insecure: whether to do without encryption, also to another machine.
    """

    name: str | None
    manager: str | None
    token: str | None
    is_insecure: bool


def keep_relay(folder: Path, joining: RelayJoining) -> RelayConfiguration:
    """Join by the token, if one is given, and keep what was given.

    Args:
        folder: the relay's own.
        joining: what was given.

    Raises:
        FlopsError: ``usage``, ``conflict`` for another name than before, ``config_invalid``,
            ``join_refused``, ``certificate_refused``, ``encryption_mismatch``, ``unreachable``.
    """
    if joining.token is not None and joining.is_insecure:
        raise FlopsError(ErrorCode.USAGE, "--token encrypts, --insecure does not: give one of them.")
    kept = RelayConfiguration.load(folder)
    token = JoinToken.parse(joining.token) if joining.token is not None else None
    name = _name(joining, kept)
    manager = _manager(joining, token, kept)
    conf = RelayConfiguration(cluster=name, manager=manager, is_insecure=joining.is_insecure)
    if kept is not None:
        is_insecure = joining.is_insecure or (kept.is_insecure and token is None)
        conf = conf.model_copy(update={"relay": kept.relay, "is_insecure": is_insecure})
    if conf.is_insecure:
        say(
            "Warning: what nodes and the manager tell each other will not be encrypted; others can change it."
        )
    if token is not None:
        _join(folder, token, conf)
    conf.save(folder)
    return conf


def _join(folder: Path, token: JoinToken, conf: RelayConfiguration) -> None:
    from flops.adapters.node_identity import join_manager

    try:
        identity = join_manager(folder / IDENTITY_FILE, token, conf.manager, conf.cluster)
    except FlopsError as error:
        has_joined = (folder / IDENTITY_FILE).exists()
        if error.code is ErrorCode.JOIN_REFUSED and has_joined:
            error.hint = "This cluster has joined already: `flops cluster up` starts it, without --token."
        elif error.code is ErrorCode.JOIN_REFUSED and error.hint == error.spec.hint:  # about nodes
            error.hint = f"Get a new token with `flops cluster invite {conf.cluster}` at the manager."
        raise
    say(f"{identity.signer} has signed the certificate of {conf.cluster}.")


def _name(joining: RelayJoining, kept: RelayConfiguration | None) -> str:
    if joining.name is not None:
        name = check_cluster_name(joining.name)
        if kept is not None and kept.cluster != name:
            raise FlopsError(
                ErrorCode.CONFLICT,
                f"The cluster of this home is {kept.cluster}, not {name}.",
                hint="Leave --name out, or run another cluster in another --home.",
            )
        return name
    if kept is None:
        raise FlopsError(
            ErrorCode.USAGE,
            "Which cluster is this to be?",
            hint="Say it with --name, as `flops cluster invite NAME` was told.",
        )
    return kept.cluster


def _manager(joining: RelayJoining, token: JoinToken | None, kept: RelayConfiguration | None) -> str:
    """``host:port`` of the manager's cluster."""
    told = joining.manager or (token.cluster if token is not None else None)
    if told is None:
        if kept is None:
            raise FlopsError(
                ErrorCode.USAGE,
                "Where is the manager?",
                hint="Give the token of `flops cluster invite`, or --manager HOST:PORT.",
            )
        return kept.manager
    scheme, separator, rest = told.rpartition("://")
    host, port = parse_address(urlsplit(f"//{rest}").netloc)
    if separator and scheme not in {"http", "https"}:
        raise FlopsError(
            ErrorCode.USAGE,
            f"{told!r} is not the address of a manager.",
            hint="Give HOST:PORT of the manager's cluster, as `flops status` shows it there.",
        )
    if scheme == "http" and not (joining.is_insecure or is_loopback(host)):
        raise FlopsError(
            ErrorCode.ENCRYPTION_MISMATCH,
            f"{told} does without encryption.",
            hint="Join with a token, at https://…; only in a network that you trust, add --insecure.",
        )
    return with_port(host, port or DEFAULT_CLUSTER_PORT)
