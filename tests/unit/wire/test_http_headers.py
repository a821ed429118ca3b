from __future__ import annotations

from flops.wire.http_headers import passed_on


def test_what_is_about_one_connection_stays_behind() -> None:
    headers = [
        (b"Connection", b"close"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Accept", b"*/*"),
        (b"TE", b""),
    ]
    assert passed_on(headers) == [(b"accept", b"*/*")]


def test_so_does_what_else_is_named() -> None:
    headers = [(b"Host", b"a"), (b"Range", b"bytes=0-1"), (b"range", b"bytes=2-3")]
    assert passed_on(headers, without=frozenset({b"host"})) == [
        (b"range", b"bytes=0-1"),
        (b"range", b"bytes=2-3"),
    ]
