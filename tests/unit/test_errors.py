"""The error catalogue is complete and errors survive every boundary."""

from __future__ import annotations

import pickle

from flops.errors import CATALOGUE, ErrorCode, FlopsError


def test_every_code_is_in_the_catalogue() -> None:
    assert set(CATALOGUE) == set(ErrorCode)


def test_exit_codes_are_unique_and_portable() -> None:
    exit_codes = [spec.exit_code for code, spec in CATALOGUE.items() if code is not ErrorCode.FORBIDDEN]
    assert len(set(exit_codes)) == len(exit_codes)
    assert all(1 < code < 126 for code in exit_codes)


def test_an_error_survives_json_and_pickle() -> None:
    error = FlopsError(ErrorCode.TAG_INVALID, "Tag 'a.b' is invalid.", details={"tag": "a.b"})
    for copy in (FlopsError.from_dict(error.to_dict()), pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert copy.to_dict() == error.to_dict()


def test_an_unknown_code_becomes_internal() -> None:
    assert FlopsError.from_dict({"code": "from_the_future", "message": "x"}).code is ErrorCode.INTERNAL
