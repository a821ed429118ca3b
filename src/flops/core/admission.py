"""Who may join a cluster: invitations, certificates of nodes and of relays, and what holds for both."""

from __future__ import annotations

from collections.abc import Collection

from flops.core.clusters import DEFAULT_CLUSTER
from flops.core.ids import NodeId
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

CLOCKS_DIFFER_BY_S = 86_400.0  # certificates say so much earlier: a node whose clock is late takes them, too


_RELAY = "cluster."


def serial_text(number: int) -> str:
    """A certificate's serial number as it is stored and told."""
    return f"{number:x}"


class Invitation(Value):
    """Lets some nodes join, for a while.

    Its secret is known to whoever holds the token; here is only what it can be checked with.
    """

    id: str
    secret_hash: str  # hex SHA-256
    nodes: int  # how many may join by it
    addons: tuple[str, ...]  # what these nodes may switch on
    expires_at_s: float
    cluster: str = DEFAULT_CLUSTER  # that they join
    is_for_relay: bool = False  # lets the relay of the cluster join, and no node


class NodeCertificate(Value):
    """A certificate that the authority has signed for a node, or for a cluster's relay."""

    serial: str  # hex
    node_id: NodeId
    key: str  # hex SHA-256 of the public key
    addons: tuple[str, ...]  # what the node may switch on
    not_before_s: float
    not_after_s: float
    pem: str
    cluster: str = DEFAULT_CLUSTER  # that it is of


class PeerCertificate(Value):
    """What a connection's other side has shown: a certificate of our authority, whether or not it is good."""

    serial: str
    name: str  # the node's id


class Caller(Value):
    """Who is at the other side of a connection."""

    peer: PeerCertificate | None = None  # a node's, as it has shown it to us or to its cluster's relay
    relay: PeerCertificate | None = None  # of the relay that it comes through
    cluster: str = DEFAULT_CLUSTER  # that a relay says it is, where nothing is encrypted


def relay_id(cluster: str) -> NodeId:
    """Whom a relay's certificate names. No node has such an id: theirs have no dots."""
    return NodeId(f"{_RELAY}{cluster}")


def is_relay(name: str) -> bool:
    """Whether a certificate's name is that of a relay."""
    return name.startswith(_RELAY)


def renewal_due(not_before_s: float, not_after_s: float, now_s: float) -> bool:
    """Whether two thirds of a certificate's life are over."""
    return now_s >= not_before_s + (not_after_s - not_before_s) * 2 / 3


def check_addressee(invitation: Invitation, cluster: str, *, is_for_relay: bool) -> None:
    """Refuse somebody whom the invitation is not for.

    Args:
        invitation: whose secret it knows.
        cluster: that it wants to join, or that it wants to be.
        is_for_relay: whether it wants to be the cluster's relay.

    Raises:
        FlopsError: ``join_refused``.
    """
    if invitation.is_for_relay != is_for_relay:
        wanted = (
            "a cluster, and this is a node" if invitation.is_for_relay else "nodes, and this is a cluster"
        )
        raise join_refused(
            f"it is for {wanted}",
            hint="`flops cluster invite` makes tokens for `flops cluster up`, `flops node invite` for nodes.",
        )
    if invitation.cluster != cluster:
        raise join_refused(
            f"it is for the cluster {invitation.cluster}, and this is {cluster}",
            hint="`flops node invite --cluster NAME` makes tokens for another cluster's nodes.",
        )


def check_join(
    invitation: Invitation, joined: Collection[str], key: str, addons: Collection[str], now_s: float
) -> None:
    """Refuse a node that the invitation does not let join.

    Args:
        invitation: whose secret it knows.
        joined: keys of the nodes that have joined by it.
        key: the node's own.
        addons: what it has switched on.
        now_s: seconds since the epoch.

    Raises:
        FlopsError: ``join_refused``.
    """
    if now_s >= invitation.expires_at_s:
        raise join_refused("its time is over")
    if key not in joined and len(joined) >= invitation.nodes:
        times = "once" if invitation.nodes == 1 else f"{invitation.nodes} times"
        raise join_refused(f"it has been used {times}, as often as it may be")
    if refused := sorted(set(addons) - set(invitation.addons)):
        raise join_refused(
            f"it does not let a node switch on {', '.join(refused)}",
            hint="Switch it off (`NodeEngine config addon NAME off`), or get a token that allows it.",
        )


def join_refused(why: str, *, hint: str | None = None) -> FlopsError:
    """The error of a token that lets nobody in."""
    return FlopsError(ErrorCode.JOIN_REFUSED, f"The token is not accepted: {why}.", hint=hint)


def check_peer(peer: PeerCertificate, certificate: NodeCertificate | None, now_s: float) -> NodeCertificate:
    """Refuse a connection whose certificate is good no more.

    Args:
        peer: what was shown.
        certificate: the one with its serial number that is in force; None when there is none.
        now_s: seconds since the epoch.

    Raises:
        FlopsError: ``certificate_refused``.
    """
    if certificate is None or certificate.node_id != peer.name:
        raise certificate_refused(peer.name, "was removed from the cluster, or has never joined it")
    if now_s >= certificate.not_after_s:
        raise certificate_refused(peer.name, "has expired")
    return certificate


def certificate_refused(name: str, why: str) -> FlopsError:
    """The error of a certificate that is not accepted; `why` goes on after whose it is."""
    if not is_relay(name):
        return FlopsError(ErrorCode.CERTIFICATE_REFUSED, f"The certificate of node {name} {why}.")
    return FlopsError(
        ErrorCode.CERTIFICATE_REFUSED,
        f"The certificate of the cluster {name.removeprefix(_RELAY)} {why}.",
        hint="Join anew: `flops cluster invite NAME` there, `flops cluster up --token TOKEN` here.",
    )
