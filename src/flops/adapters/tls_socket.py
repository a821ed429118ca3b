"""A TLS connection that two threads may use at once: one reads while the other writes.

Python's own (`ssl.SSLSocket`) hands both to the same OpenSSL object at the same moment, which that does not
allow; a link that reads in one thread and writes in another breaks by it, or hangs.
"""

from __future__ import annotations

import socket
import ssl
import threading
from typing import Any

_CHUNK_BYTES = 65_536


class TlsSocket:
    """Like a connected socket; what it does not have itself is the underlying one's.

    Args:
        connection: a connected socket, which it closes when the handshake fails.
        tls: how to encrypt.
        host: whom to expect at the other side.

    Raises:
        OSError: `ssl.SSLError` among them: the handshake has failed.
    """

    def __init__(self, connection: socket.socket, tls: ssl.SSLContext, host: str) -> None:
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = tls.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._lock = threading.Lock()  # of the OpenSSL object
        self._send_lock = threading.Lock()  # so that what was encrypted first is sent first
        try:
            self._shake_hands()
        except OSError:
            connection.close()
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def recv(self, size: int) -> bytes:
        """Wait for bytes; none at the end of the connection.

        All that has been decrypted is given at once, also beyond `size`: who waits for the socket to be
        readable, before the next call, would not hear of what is left.
        """
        data, is_open = self._read_all(size)
        while not data and is_open:
            self._flush()
            self._take_in()
            data, is_open = self._read_all(size)
        return data

    def _read_all(self, size: int) -> tuple[bytes, bool]:
        """What is decrypted, and whether more may come."""
        data = b""
        with self._lock:
            try:
                while piece := self._object.read(size):
                    data += piece
            except ssl.SSLWantReadError:
                return data, True
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                pass
        return data, False

    def sendall(self, data: bytes) -> None:
        """Send bytes, all of them."""
        with self._send_lock:
            with self._lock:
                view = memoryview(data)
                while view:
                    view = view[self._object.write(view) :]
            self._send_pending()

    def _shake_hands(self) -> None:
        while True:
            try:
                self._object.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._take_in()
            except ssl.SSLError:
                self._flush()  # the alert that says why
                raise
            else:
                self._flush()
                return

    def _flush(self) -> None:
        with self._send_lock:
            self._send_pending()

    def _send_pending(self) -> None:
        with self._lock:
            pending = self._outgoing.read()
        if pending:
            self._connection.sendall(pending)

    def _take_in(self) -> None:
        data = self._connection.recv(_CHUNK_BYTES)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
