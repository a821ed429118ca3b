from __future__ import annotations

import pytest

from flops.core.sla import Strategy, StrategyName, parse_project_sla
from flops.core.strategies import STRATEGY_PARAMETERS, strategy_problem
from flops.errors import ErrorCode, FlopsError


def test_every_strategy_has_its_parameters() -> None:
    assert set(STRATEGY_PARAMETERS) == {name.value for name in StrategyName}


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("FedAvg", {"eta": 1.0}, "FedAvg has no parameter 'eta'; it takes: none"),
        (
            "FedAdam",
            {"gamma": 1.0},
            "FedAdam has no parameter 'gamma'; it takes: eta, eta_l, beta_1, beta_2, tau",
        ),
        ("FedAdam", {"beta_1": 1.0}, "FedAdam's beta_1 is 1; it must be a number from 0 below 1"),
        ("FedProx", {"proximal_mu": -1.0}, "FedProx's proximal_mu is -1; it must be a number from 0"),
        ("FedTrimmedAvg", {"beta": 0.5}, "FedTrimmedAvg's beta is 0.5; it must be a number from 0 below 0.5"),
        ("Krum", {"num_malicious_nodes": 0.5}, "it must be a whole number from 0"),
        ("QFedAvg", {}, "QFedAvg needs client_learning_rate, a number above 0"),
        ("FedAdam", {"eta": float("nan")}, "eta is nan"),
    ],
)
def test_wrong_parameters_are_named(name: str, parameters: dict[str, float], problem: str) -> None:
    assert problem in str(strategy_problem(name, parameters))


def test_an_sla_with_a_wrong_parameter_is_refused_when_it_is_submitted() -> None:
    sla = {
        "ml_repo_url": "file:///repo",
        "ml_model_flavor": "sklearn",
        "training_configuration": {
            "data_tags": ["mnist"],
            "strategy": {"name": "FedProx", "parameters": {"mu": 1}},
        },
    }
    with pytest.raises(FlopsError) as caught:
        parse_project_sla(sla)
    assert caught.value.code is ErrorCode.SLA_INVALID
    assert "FedProx has no parameter 'mu'; it takes: proximal_mu" in caught.value.message


def test_right_parameters_are_taken() -> None:
    assert Strategy(name=StrategyName.FED_YOGI, parameters={"eta": 0.1}).parameters == {"eta": 0.1}
