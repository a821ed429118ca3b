from __future__ import annotations

import json

import pytest

from flops.disclosure import Disclosure, disclosed, parse_disclosure
from flops.errors import ErrorCode, FlopsError
from flops.node.configuration import NodeConfiguration, check_configuration

FAILURE = FlopsError(
    ErrorCode.USER_CODE_FAILED,
    "The ML repository failed to train on alpha in m.py, line 3: ValueError: secret",
    details={"traceback": "secret", "output": "secret", "extra": "secret", "phase": "train", "round": 2},
)


def test_everything_is_revealed_unless_the_operator_says_otherwise() -> None:
    assert NodeConfiguration({}).disclosure is Disclosure.FULL
    assert disclosed(FAILURE, Disclosure.FULL, "alpha") is FAILURE


def test_a_message_has_the_exception_and_its_place_but_nothing_longer() -> None:
    told = disclosed(FAILURE, Disclosure.MESSAGE, "alpha")
    assert told.message == FAILURE.message
    assert told.details == {"phase": "train", "round": 2, "node": "alpha", "disclosure": "message"}


def test_nothing_means_only_that_it_failed_where_and_in_which_phase() -> None:
    told = disclosed(FAILURE, Disclosure.NONE, "alpha")
    assert told.message == "The ML repository failed to train on alpha, which does not reveal why."
    assert "secret" not in json.dumps(told.to_dict())
    assert told.code is ErrorCode.USER_CODE_FAILED


@pytest.mark.parametrize("disclosure", list(Disclosure))
@pytest.mark.parametrize("code", list(ErrorCode))
def test_revealing_twice_is_the_same_as_once(disclosure: Disclosure, code: ErrorCode) -> None:
    once = disclosed(FlopsError(code, "why", details=FAILURE.details), disclosure, "alpha")
    assert disclosed(once, disclosure, "alpha").to_dict() == once.to_dict()
    assert FAILURE.details["traceback"] == "secret"


def test_a_choice_is_one_of_three() -> None:
    assert parse_disclosure(" None ") is Disclosure.NONE
    with pytest.raises(FlopsError, match="'some'") as caught:
        parse_disclosure("some")
    assert caught.value.code is ErrorCode.CONFIG_INVALID
    assert "full, message, none" in caught.value.hint


@pytest.mark.parametrize("value", ["some", "FULL", 1, True])
def test_a_choice_in_the_file_that_is_none_is_not_taken_for_another(value: object) -> None:
    with pytest.raises(FlopsError, match="failure_disclosure") as caught:
        check_configuration({"failure_disclosure": value})
    assert caught.value.code is ErrorCode.CONFIG_CORRUPT
