"""The SLA names every wrong key with its value; defaults are the ancestor's."""

from __future__ import annotations

from typing import Any

import pytest

from flops.core.sla import parse_mock_data_sla, parse_project_sla
from flops.errors import ErrorCode, FlopsError

MINIMAL: dict[str, Any] = {
    "customerID": "Admin",
    "ml_repo_url": "https://github.com/example/mnist",
    "ml_model_flavor": "sklearn",
    "training_configuration": {"data_tags": ["mnist"]},
}


def test_minimal_sla_has_the_known_defaults() -> None:
    sla = parse_project_sla(MINIMAL)
    training = sla.training_configuration
    assert (training.mode, training.training_rounds, training.training_cycles) == ("classic", 3, 1)
    assert (training.min_available_clients, training.min_fit_clients, training.min_evaluate_clients) == (
        1,
        1,
        1,
    )
    assert (sla.resource_constraints.memory, sla.resource_constraints.vcpus) == (100, 1)
    assert sla.supported_platforms == ("linux/amd64",)
    assert not sla.post_training_steps


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("surprise", 1, "surprise: unknown key"),
        ("ml_model_flavor", "prophet", "'prophet'"),
        ("training_configuration.data_tags", [], "training_configuration.data_tags"),
        ("training_configuration.data_tags", ["a.b"], "training_configuration.data_tags.0"),
        ("training_configuration.training_rounds", 0, "got 0"),
        ("training_configuration.min_fit_clients", -1, "got -1"),
        ("training_configuration.min_fit_clients", 5, "min_available_clients = 1"),
        ("training_configuration.extra", True, "training_configuration.extra: unknown key"),
        ("resource_constraints.memory", 0, "resource_constraints.memory"),
        ("post_training_steps", ["deploy_trained_model_image"], "without build_image_for_trained_model"),
    ],
)
def test_wrong_values_are_named(path: str, value: object, expected: str) -> None:
    raw: dict[str, Any] = {**MINIMAL, "training_configuration": dict(MINIMAL["training_configuration"])}
    *parents, key = path.split(".")
    target = raw
    for parent in parents:
        target = target.setdefault(parent, {})
    target[key] = value
    with pytest.raises(FlopsError) as caught:
        parse_project_sla(raw)
    assert caught.value.code is ErrorCode.SLA_INVALID
    assert expected in caught.value.message


def test_mock_sla_needs_a_tag() -> None:
    with pytest.raises(FlopsError, match="data_tag"):
        parse_mock_data_sla({"customerID": "Admin", "mock_data_configuration": {"dataset_name": "mnist"}})


def test_boosted_trees_and_their_strategy_need_each_other() -> None:
    trees = {"ml_model_flavor": "xgboost"}
    bagging = {**MINIMAL["training_configuration"], "strategy": {"name": "FedXgbBagging"}}
    parse_project_sla({**MINIMAL, **trees, "training_configuration": bagging})
    for wrong in (trees, {"training_configuration": bagging}):
        with pytest.raises(FlopsError, match="FedXgbBagging") as caught:
            parse_project_sla({**MINIMAL, **wrong})
        assert caught.value.code is ErrorCode.SLA_INVALID
