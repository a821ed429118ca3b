"""The best parameters and the bundle on their way out."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from flops.errors import ErrorCode, FlopsError
from flops.trainer.delivery import keep_best, pack, patiently, store_bundle


class Blobs(BaseHTTPRequestHandler):
    stored: ClassVar[dict[str, bytes]]
    refusals: ClassVar[list[tuple[int, bytes]]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, answer = self.refusals.pop(0) if self.refusals else (201, b"")
        if status == 201:
            self.stored[self.path] = body
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def blobs() -> Iterator[tuple[str, type[Blobs]]]:
    class Handler(Blobs):
        stored: ClassVar[dict[str, bytes]] = {}
        refusals: ClassVar[list[tuple[int, bytes]]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/blobs", Handler
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_same_folder_gives_the_same_bundle(tmp_path: Path) -> None:
    bundles = []
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "data").mkdir(parents=True)
        for file in ("MLmodel", "data/model.bin"):
            (folder / file).write_text(file)
            os.utime(folder / file, (len(bundles), len(bundles)))
        bundles.append(pack(folder))
    assert bundles[0] == bundles[1]
    with tarfile.open(fileobj=io.BytesIO(bundles[0])) as archive:
        assert archive.getnames() == ["MLmodel", "data", "data/model.bin"]


def test_a_bundle_is_stored_under_its_digest(blobs: tuple[str, type[Blobs]]) -> None:
    url, handler = blobs
    digest = store_bundle(b"model", url, 5)
    assert digest == hashlib.sha256(b"model").hexdigest()
    assert handler.stored == {f"/blobs/{digest}": b"model"}


def test_blobs_that_are_away_for_a_moment_are_waited_for(blobs: tuple[str, type[Blobs]]) -> None:
    url, handler = blobs
    handler.refusals.extend([(503, b"starting"), (500, b"")])
    store_bundle(b"model", url, 5)
    assert len(handler.stored) == 1


def test_a_refusal_is_told(blobs: tuple[str, type[Blobs]]) -> None:
    url, handler = blobs
    body = b'{"code": "forbidden", "message": "Not you."}'
    handler.refusals.append((403, body))
    with pytest.raises(FlopsError) as caught:
        store_bundle(b"model", url, 5)
    assert (caught.value.code, caught.value.message) == (ErrorCode.FORBIDDEN, "Not you.")


def test_blobs_that_stay_away_are_told() -> None:
    with pytest.raises(FlopsError) as caught:
        store_bundle(b"model", "http://127.0.0.1:1/blobs", 0.1)
    assert caught.value.code is ErrorCode.UNREACHABLE


def test_what_does_not_answer_is_waited_for_longer_than_what_answers_with_errors() -> None:
    away = FlopsError(ErrorCode.UNREACHABLE, "It is away.")
    broken = FlopsError(ErrorCode.TRACKING_FAILED, "It is broken.")
    errors = [away, away, away, away]  # 1.5 s

    def fail() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(fail, 0.3, away_patience_s=60) == "done"
    errors.extend([broken] * 20)
    with pytest.raises(FlopsError, match="It is broken"):
        patiently(fail, 0.3, away_patience_s=60)
    assert len(errors) > 15


def test_patience_ends_at_once_where_it_cannot_help() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise FlopsError(ErrorCode.MODEL_EXPORT_FAILED, "It is no model.")

    with pytest.raises(FlopsError):
        patiently(fail, 60)
    assert len(calls) == 1


def test_the_best_parameters_replace_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "round-1.npz").write_bytes(b"new")
    (tmp_path / "best.npz").write_bytes(b"old")
    keep_best(tmp_path / "round-1.npz", tmp_path / "best.npz")
    assert (tmp_path / "best.npz").read_bytes() == b"new"
    assert (tmp_path / "round-1.npz").exists()
