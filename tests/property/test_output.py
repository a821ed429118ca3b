"""Output files: whatever is written, rotated, restarted and killed, places tell the truth."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flops.adapters.output_files import OutputWriter
from flops.adapters.runtime_records import read_output_of
from flops.core.output import Output, piece_of

WRITES = st.lists(
    st.one_of(
        st.text("aé\n🙂", min_size=10, max_size=30).map(lambda text: ("write", text.encode())),
        st.binary(min_size=20, max_size=60).map(lambda data: ("write", data)),
        st.just(("restart", b"")),
        st.just(("removed", b"")),  # the older file, by somebody
    ),
    min_size=5,
    max_size=40,
)


@given(writes=WRITES, limit_bytes=st.integers(40, 120), piece_bytes=st.integers(8, 64))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_reader_misses_nothing_that_it_is_not_told_of(
    writes: list[tuple[str, bytes]], limit_bytes: int, piece_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s1.log"
        writer = OutputWriter(path, limit_bytes)
        written, place = b"", 0
        for kind, data in writes:
            if kind == "restart":
                writer = OutputWriter(path, limit_bytes)
            elif kind == "removed":
                path.with_name("s1.log.1").unlink(missing_ok=True)
            writer.write(data)
            written += data
            piece = read_output_of(path, place, piece_bytes)
            assert piece.total == len(written)
            assert place <= piece.start <= piece.end <= piece.total
            assert piece.text == written[piece.start : piece.end].decode(errors="replace")
            if piece.start > place and b"\n" in written[piece.start - 1 : piece.end - 1]:
                assert written[piece.start - 1 : piece.start] == b"\n"
            place = piece.end
        tail = read_output_of(path, None, piece_bytes)
        assert tail.text == written[tail.start : tail.end].decode(errors="replace")


@given(text=st.text("aé🙂\n", max_size=200), piece_bytes=st.integers(4, 50))
def test_pieces_are_whole_characters_and_make_up_the_text(text: str, piece_bytes: int) -> None:
    data = text.encode()
    pieces, place = "", 0
    while place < len(data):
        piece = piece_of(
            lambda start, end: data[start:end], 0, len(data), after=place, limit_bytes=piece_bytes
        )
        assert piece.end > place
        pieces, place = pieces + piece.text, piece.end
    assert pieces == text


def test_a_line_begins_where_it_began() -> None:
    data = b"first\nsecond\nthird\n"

    def tail(limit_bytes: int) -> str:
        return piece_of(
            lambda start, end: data[start:end], 0, len(data), after=None, limit_bytes=limit_bytes
        ).text

    assert tail(6) == "third\n"
    assert tail(7) == "third\n"
    assert tail(5) == "hird\n"  # of one line, the end
    assert tail(13) == "second\nthird\n"
    assert tail(100) == data.decode()


def test_a_place_that_never_was_begins_anew() -> None:
    piece = piece_of(lambda start, end: b"new\n"[start:end], 0, 4, after=100, limit_bytes=10)
    assert piece == Output(text="new\n", start=0, end=4, total=4)
