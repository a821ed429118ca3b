"""Parameters of the aggregation strategies, and the values they may have. Names are Flower's."""

from __future__ import annotations

import math
from collections.abc import Mapping

from flops.core.model import Value


class Parameter(Value):
    """A parameter of a strategy, with the values it may have."""

    low: float = -math.inf
    high: float = math.inf
    is_low_open: bool = False
    is_high_open: bool = False
    is_whole: bool = False
    is_required: bool = False

    def accepts(self, value: float) -> bool:
        """Whether the parameter may have this value."""
        is_above = value > self.low if self.is_low_open else value >= self.low
        is_below = value < self.high if self.is_high_open else value <= self.high
        return is_above and is_below and (not self.is_whole or float(value).is_integer())

    def range(self) -> str:
        """The allowed values, for people."""
        kind = "a whole number" if self.is_whole else "a number"
        low = f" {'above' if self.is_low_open else 'from'} {self.low:g}" if math.isfinite(self.low) else ""
        high = f" {'below' if self.is_high_open else 'to'} {self.high:g}" if math.isfinite(self.high) else ""
        return f"{kind}{low}{high}"


_RATE = Parameter(low=0, is_low_open=True)
_DECAY = Parameter(low=0, high=1, is_high_open=True)

STRATEGY_PARAMETERS: Mapping[str, Mapping[str, Parameter]] = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": _RATE, "server_momentum": _DECAY},
    "FedProx": {"proximal_mu": Parameter(low=0)},
    "FedAdagrad": {"eta": _RATE, "eta_l": _RATE, "tau": _RATE},
    "FedAdam": {"eta": _RATE, "eta_l": _RATE, "beta_1": _DECAY, "beta_2": _DECAY, "tau": _RATE},
    "FedYogi": {"eta": _RATE, "eta_l": _RATE, "beta_1": _DECAY, "beta_2": _DECAY, "tau": _RATE},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": Parameter(low=0, high=0.5, is_high_open=True)},
    "Krum": {"num_malicious_nodes": Parameter(low=0, is_whole=True)},
    "QFedAvg": {"client_learning_rate": Parameter(low=0, is_low_open=True, is_required=True), "q": _RATE},
    "FedXgbBagging": {},
}


def strategy_problem(name: str, parameters: Mapping[str, float]) -> str | None:
    """What is wrong with a strategy's parameters, in one sentence; None when they are right."""
    known = STRATEGY_PARAMETERS[name]
    for key, value in parameters.items():
        if key not in known:
            accepted = ", ".join(known) or "none"
            return f"{name} has no parameter {key!r}; it takes: {accepted}"
        if not math.isfinite(value) or not known[key].accepts(value):
            return f"{name}'s {key} is {value:g}; it must be {known[key].range()}"
    for key, parameter in known.items():
        if parameter.is_required and key not in parameters:
            return f"{name} needs {key}, {parameter.range()}"
    return None
