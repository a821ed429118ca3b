"""Clients of an inference service that ask which version answers, again and again."""

from __future__ import annotations

import threading

import httpx

from flops.testing.waiting import until

_PAUSE_S = 0.01
_TIMEOUT_S = 30.0


class Hammer:
    """Asks from several threads until it is stopped: half of them with new connections, half with kept ones.

    Args:
        url: base URL of the service.
        clients: how many threads.

    Attributes:
        versions: what was answered, in order.
        failures: what was no answer.
    """

    def __init__(self, url: str, clients: int = 4) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._url = url
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number % 2 == 0,)) for number in range(clients)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for_only(self, version: str) -> None:
        """Wait for answers of all clients; what asks from now on is to be answered by this version."""
        asked = len(self.versions)
        under_way = len(self._threads)  # these may have been asked of another one before
        until(lambda: len(self.versions) > asked + 10 * under_way, "answers", timeout_s=60.0)
        assert set(self.versions[asked + under_way :]) == {version}

    def stop(self) -> None:
        """End the threads, after the answers that they wait for."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, keeps_connection: bool) -> None:
        headers = {} if keeps_connection else {"connection": "close"}
        with httpx.Client(trust_env=False, timeout=_TIMEOUT_S, headers=headers) as client:
            while not self._is_over.wait(_PAUSE_S):
                try:
                    described = client.get(f"{self._url}/").raise_for_status().json()
                    self.versions.append(described["model"]["version"])
                except (httpx.HTTPError, ValueError, KeyError) as exc:
                    self.failures.append(repr(exc))
