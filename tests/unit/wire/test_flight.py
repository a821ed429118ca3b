"""Names, tickets, tokens and errors of the data server, as both sides read them."""

from __future__ import annotations

import json

import pytest

from flops.core.sla import TAG_PATTERN
from flops.errors import ErrorCode, FlopsError
from flops.wire import flight
from flops.wire.flight import Query, Right, Scope, UploadName


def _code(error: pytest.ExceptionInfo[FlopsError]) -> ErrorCode:
    return error.value.code


def test_tags_are_the_tags_of_the_sla() -> None:
    assert f"^{flight._TAG.pattern}$" == TAG_PATTERN


def test_the_admin_token_may_everything() -> None:
    scope = flight.verify_token("secret", "secret")
    scope.check(Right.READ, ["any"])
    scope.check(Right.ADMIN)


def test_a_minted_token_is_good_for_its_scope_only() -> None:
    scope = flight.verify_token("secret", flight.mint_token("secret", Scope(Right.READ, ("a", "b"))))
    scope.check(Right.READ, ["a", "b"])
    for right, tags in ((Right.READ, ["c"]), (Right.WRITE, ["a"]), (Right.ADMIN, [])):
        with pytest.raises(FlopsError) as caught:
            scope.check(right, tags)
        assert _code(caught) is ErrorCode.FORBIDDEN


def test_a_token_without_tags_is_good_for_all() -> None:
    Scope(Right.WRITE).check(Right.WRITE, ["x"])


@pytest.mark.parametrize(
    "token",
    ["", "other", "flops1..", "flops1.e30.AAAA", "flops1.%%.%%", "flops1.é.é", "a.b.c"],
)
def test_other_tokens_are_refused(token: str) -> None:
    with pytest.raises(FlopsError) as caught:
        flight.verify_token("secret", token)
    assert _code(caught) is ErrorCode.UNAUTHENTICATED


def test_a_changed_claim_or_another_secret_is_refused() -> None:
    prefix, claim, signature = flight.mint_token("secret", Scope(Right.READ, ("a",))).split(".")
    _, other_claim, _ = flight.mint_token("secret", Scope(Right.WRITE, ("a",))).split(".")
    for admin, token in (
        ("secret", f"{prefix}.{other_claim}.{signature}"),
        ("other", f"{prefix}.{claim}.{signature}"),
    ):
        with pytest.raises(FlopsError):
            flight.verify_token(admin, token)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("mnist", UploadName("mnist")),
        (
            "mnist.d41d8cd98f00b204e9800998ecf8427e.parquet",
            UploadName("mnist", "d41d8cd98f00b204e9800998ecf8427e"),
        ),
        ("a-b_c.x-1_y.parquet", UploadName("a-b_c", "x-1_y")),
    ],
)
def test_upload_names(name: str, parsed: UploadName) -> None:
    assert flight.parse_upload_name(name) == parsed


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("", ErrorCode.TAG_INVALID),
        ("-a", ErrorCode.TAG_INVALID),
        ("a b", ErrorCode.TAG_INVALID),
        ("a\n", ErrorCode.TAG_INVALID),
        ("a" * 65, ErrorCode.TAG_INVALID),
        ("a.b.c.parquet", ErrorCode.TAG_INVALID),
        ("..parquet", ErrorCode.NAME_INVALID),
        ("a.parquet", ErrorCode.NAME_INVALID),
        ("a.b", ErrorCode.NAME_INVALID),
        ("a..parquet", ErrorCode.NAME_INVALID),
        ("../tmp/x.parquet", ErrorCode.NAME_INVALID),
        ("../a.b.parquet", ErrorCode.NAME_INVALID),
        ("a.../../b.parquet", ErrorCode.NAME_INVALID),
        ("a.b\x00.parquet", ErrorCode.NAME_INVALID),
        ("a.b.parquet\n", ErrorCode.NAME_INVALID),
        ("C:\\a.b.parquet", ErrorCode.NAME_INVALID),
        (f"a.{'b' * 101}.parquet", ErrorCode.NAME_INVALID),
    ],
)
def test_wrong_names_are_refused(name: str, code: ErrorCode) -> None:
    with pytest.raises(FlopsError) as caught:
        flight.parse_upload_name(name)
    assert _code(caught) is code


def test_a_ticket_survives_the_way() -> None:
    query = Query(("a", "b"), 1, 3)
    assert flight.parse_ticket(flight.ticket_for(query)) == query
    assert flight.parse_ticket(b'{"data_tags": ["a"]}') == Query(("a",))
    assert flight.parse_ticket(b"a.b.parquet") == UploadName("a", "b")


@pytest.mark.parametrize(
    "ticket",
    [
        b"{",
        b"{}",
        b'{"data_tags": []}',
        b'{"data_tags": 7}',
        b'{"data_tags": ["a"], "part": 2, "parts": 2}',
        b'{"data_tags": ["a"], "part": -1, "parts": 2}',
        b'{"data_tags": ["a"], "part": "0", "parts": 2}',
        b'{"data_tags": ["a"], "part": false, "parts": true}',
    ],
)
def test_wrong_tickets_are_refused(ticket: bytes) -> None:
    with pytest.raises(FlopsError) as caught:
        flight.parse_ticket(ticket)
    assert _code(caught) is ErrorCode.USAGE


@pytest.mark.parametrize(
    ("criteria", "tags"),
    [
        (b"", ()),
        (b" ", ()),
        (b"{}", ()),
        (b'{"data_tags": "a"}', ("a",)),
        (b'{"data_tags": ["a", "b", "a"]}', ("a", "b")),
        (flight.criteria_for(["a"]), ("a",)),
    ],
)
def test_criteria(criteria: bytes, tags: tuple[str, ...]) -> None:
    assert flight.parse_criteria(criteria) == tags


@pytest.mark.parametrize("criteria", [b"[]", b"nonsense", b"\xff", b'{"data_tags": {"a": 1}}'])
def test_wrong_criteria_are_refused(criteria: bytes) -> None:
    with pytest.raises(FlopsError) as caught:
        flight.parse_criteria(criteria)
    assert _code(caught) is ErrorCode.USAGE


def test_a_tag_of_criteria_must_be_one() -> None:
    with pytest.raises(FlopsError) as caught:
        flight.parse_criteria(b'{"data_tags": ["a.b"]}')
    assert _code(caught) is ErrorCode.TAG_INVALID


def test_an_error_survives_the_way() -> None:
    error = FlopsError(ErrorCode.DATA_EMPTY, 'No row in {"code": "x"}.', hint="ü", details={"tag": "a"})
    text = f"Flight returned error, with message: {flight.error_text(error)}. gRPC client debug context: {{}}"
    found = flight.parse_error(text)
    assert found is not None
    assert found.to_dict() == error.to_dict()


def test_a_long_error_is_cut_to_what_grpc_carries() -> None:
    error = FlopsError(ErrorCode.INTERNAL, "x" * 9_000, details={"tag": "y" * 9_000})
    text = flight.error_text(error)
    assert len(text) < 4_000
    found = flight.parse_error(text)
    assert found is not None
    assert found.code is ErrorCode.INTERNAL


@pytest.mark.parametrize("text", ["", "connection refused", '{"code": '])
def test_other_texts_hold_no_error(text: str) -> None:
    assert flight.parse_error(text) is None


def test_a_seal_says_how_many_rows_there_are() -> None:
    assert flight.parse_seal(flight.seal(7)) == 7
    for other in (b"", b"7", b"{}", json.dumps({"rows": None}).encode()):
        assert flight.parse_seal(other) == -1
