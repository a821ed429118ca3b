"""Logs carry ids and no secrets."""

from __future__ import annotations

import json
import logging

import pytest

from flops.log import JsonFormatter, log_context, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ('"learner_token": "s3cret"', '"learner_token": "***"'),
        ("clone https://me:s3cret@example.org/x.git", "clone https://me:***@example.org/x.git"),
        ("ready at http://127.0.0.1:5072/docs", "ready at http://127.0.0.1:5072/docs"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_a_line_is_json_with_the_ids_of_its_context() -> None:
    record = logging.LogRecord("flops.x", logging.INFO, "x.py", 1, "token=%s", ("abc",), None)
    with log_context(project_id="p1"):
        line = json.loads(JsonFormatter().format(record))
    assert (line["project_id"], line["message"], line["level"]) == ("p1", "token=***", "INFO")
