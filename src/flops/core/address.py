"""Addresses that servers listen on, and at which others reach them."""

from __future__ import annotations

from flops.errors import ErrorCode, FlopsError

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 (compared, not bound)


def is_any(host: str) -> bool:
    """Whether it stands for all addresses of this machine."""
    return host in _ANY


def reached_here(host: str) -> str:
    """Where programs of this machine reach what listens on an address."""
    return _ANY.get(host, host)


def with_port(host: str, port: int) -> str:
    """``host:port``, with brackets where they are needed."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_port(address: str) -> tuple[str, int]:
    """Host and port of what `with_port` has made; the host without brackets.

    Raises:
        ValueError: there is no port.
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def reached_elsewhere(host: str, named: str | None, what: str) -> str:
    """Where other machines reach what listens on an address.

    Args:
        host: the address that it listens on.
        named: what an operator says; None if nothing.
        what: listens there, as the beginning of a sentence.

    Raises:
        FlopsError: ``usage`` for all addresses, when none is named.
    """
    found = named or host
    if is_any(found):
        raise FlopsError(
            ErrorCode.USAGE,
            f"{what} listens on all addresses ({found}): at which one is it reached?",
            hint="Say it with --address.",
        )
    return found
