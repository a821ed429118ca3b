"""The aggregator: waits for learners, runs the rounds, and hands over the best model.

One below another aggregator is `flops.trainer.cluster`'s.

Runs in FLOps' own environment: ``python -m flops.wiring aggregator CONTEXT.json``. Started again in the same
work folder, it goes on after the last finished round, on the same port if it is free.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flops import network_rules
from flops.actor import CONTEXT_FILE, ActorContext, EventLog
from flops.core.ids import ProjectId
from flops.core.project import Round
from flops.core.rounds import best_round, reason_to_end
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError
from flops.tracker_port import Tracker
from flops.trainer.cluster import train_cluster
from flops.trainer.delivery import keep_best, pack, patiently, store_bundle
from flops.trainer.disk_patience import PATIENCE_S as DISK_PATIENCE_S
from flops.trainer.disk_patience import when_there_is_space
from flops.trainer.gathering import JOIN_PATIENCE_S
from flops.trainer.ml_repo import read_parameters
from flops.trainer.model_process import ModelProcess
from flops.trainer.tier import Tier
from flops.trainer.tracking_feed import TrackedRun, TrackingFeed
from flops.wire.cluster_tls import http_options
from flops.wire.services import AggregatorConfig
from flops.wire.training import Array

_EXPORT_LEAD_S = 20.0  # before the end; its libraries are imported by then, also on a slow machine
_TRACKING_PATIENCE_S = 300.0
_STORE_PATIENCE_S = 300.0
_AWAY_PATIENCE_S = 86_400.0  # of the two above: a network may be down for hours, and nothing is lost for it
_CLOSE_PATIENCE_S = 3.0
_COMPLETED_FILE = "completed.json"  # the model, once everything is done


def main(
    context: ActorContext,
    events: EventLog,
    tracker_factory: Callable[[str], Tracker],
    environ: Mapping[str, str],
) -> None:
    """Train a project.

    Args:
        context: of the service; its config is an `AggregatorConfig`.
        events: where progress is told.
        tracker_factory: makes the tracker for a tracking URI.
        environ: environment that children start from.

    Raises:
        FlopsError: why there is no model.
    """
    config = _parse(context)
    _on_sigterm(signal.default_int_handler)  # a stopped project's run is closed, too
    if config.parent is not None:
        train_cluster(context, config, events)
        return
    completed = Path(context.work_dir) / _COMPLETED_FILE
    if completed.exists():  # nothing is left to do; the run, which has its end, stays as it is
        events.tell("training_completed", model=json.loads(completed.read_text()))
        return
    training = Training(context, config, events, tracker_factory, environ)
    try:
        training.run()
    except FlopsError as exc:
        # The end takes seconds when the tracking server is away. Who is told now asks for the end that comes.
        _on_sigterm(signal.SIG_IGN)
        events.tell_failure(exc)
        raise
    finally:
        training.close()


def _on_sigterm(handler: Callable[..., Any] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


class Training:
    """One project's training, from waiting for learners to the stored model.

    Args:
        context: of the service.
        config: what to train.
        events: where progress is told.
        tracker_factory: makes the tracker for a tracking URI.
        environ: environment that children start from.
        join_patience_s: longest time in which nobody loads and too few have joined for the first round.
    """

    def __init__(
        self,
        context: ActorContext,
        config: AggregatorConfig,
        events: EventLog,
        tracker_factory: Callable[[str], Tracker],
        environ: Mapping[str, str],
        *,
        join_patience_s: float = JOIN_PATIENCE_S,
    ) -> None:
        self._context = context
        self._config = config
        self._events = events
        self._work_dir = Path(context.work_dir)
        self._environ = {**environ, "PYTHONPATH": context.kit_dir}
        self._children: list[ModelProcess] = []
        self._export: ModelProcess | None = None  # once it is started
        self._is_successful = False
        self._tier = Tier(context, config, events, join_patience_s=join_patience_s)
        self._feed = TrackingFeed(
            lambda: tracker_factory(config.tracking_uri),
            ProjectId(config.project_id),
            _params_of(config),
            # The same work folder is the same training; another one begins anew.
            {**config.tags, "flops.attempt": context.service_id},
            self._tell_run,
        )

    def run(self) -> None:
        """Train, and hand over the best model.

        Raises:
            FlopsError: why there is no model.
        """
        parameters = self._begin()
        while not self._is_over():
            self._prepare_export()
            finished = self._tier.run_round(len(self._history) + 1, parameters)
            parameters = finished.parameters
            self._feed.add([finished.record])
        if (reason := self._reason_to_end()) is not None:
            self._tier.tell(f"{reason} The training ends here.")
        self._deliver()

    def close(self) -> None:
        """End what was started: children, the run, the learners' connections."""
        for child in self._children:
            child.kill()
        self._feed.close(has_failed=not self._is_successful, patience_s=_CLOSE_PATIENCE_S)
        self._tier.server.stop(is_over=self._is_successful)

    # --- beginning ---

    def _begin(self) -> list[Array]:
        """Wait for the learners, and get the parameters to go on from."""
        checkpoint = self._tier.restore()
        if checkpoint is not None:
            self._feed.add(self._history)
            if not self._is_over():
                self._tier.tell(
                    f"Going on after {self._round} {len(self._history)} of {self._config.rounds}."
                )
                self._tier.await_return()
            return checkpoint.parameters
        target = self._work_dir / "first.npz"
        child = self._child(
            self._context.project_python,
            "flops.trainer.model_host",
            (str(target),),
            doing="makes the model's first parameters",
            code=ErrorCode.USER_CODE_FAILED,
        )
        self._tier.gathering.wait(lambda: child.has_failed)
        child.wait()
        return read_parameters(target)

    @property
    def _history(self) -> list[Round]:
        return self._tier.history

    @property
    def _round(self) -> str:
        """What a round is called in the middle of a sentence."""
        return self._tier.terms.round.lower()

    def _is_over(self) -> bool:
        return self._reason_to_end() is not None or len(self._history) >= self._config.rounds

    def _reason_to_end(self) -> str | None:
        return reason_to_end(self._history, self._config.target_metric, self._config.early_stopping)

    # --- the end ---

    def _deliver(self) -> None:
        """Export, track, register and store the best round's model."""
        best = best_round(self._history)
        if best is None:
            raise FlopsError(
                ErrorCode.ROUND_FAILED,
                f"None of the {len(self._history)} rounds has a finite accuracy or loss: none is the best.",
                hint="evaluate_model() must return one of them as a number. NaN often means that training "
                "diverged: lower its learning rate.",
            )
        self._tier.tell(f"Saving the model of {self._round} {best.number}, the best one.")
        parameters, folder = self._work_dir / "best.npz", self._work_dir / f"model-{best.number}"
        when_there_is_space(
            lambda: keep_best(self._tier.store.parameters_file(best.number), parameters),
            "Keeping the best parameters",
            tell=self._tier.tell,
            patience_s=DISK_PATIENCE_S,
        )
        if not folder.exists():  # a folder is whole or not there; this is a restart when it is there
            export = self._export or self._start_export()
            export.order(str(parameters), str(folder))
            export.wait()
        tracker, run = self._feed.wait(_TRACKING_PATIENCE_S, away_patience_s=_AWAY_PATIENCE_S)
        model = patiently(
            lambda: tracker.log_model(run.run_id, folder, best, self._config.model_name),
            _TRACKING_PATIENCE_S,
            away_patience_s=_AWAY_PATIENCE_S,
        )
        if self._context.blobs_url:
            bundle, url = pack(folder), self._context.blobs_url
            context = self._context
            options = http_options(context.authority, context.service_id, context.key, context.cluster)
            digest = store_bundle(
                bundle, url, _STORE_PATIENCE_S, away_patience_s=_AWAY_PATIENCE_S, options=options
            )
            model = model.model_copy(update={"bundle": digest})
        patiently(lambda: tracker.close_run(run.run_id, is_success=True), _TRACKING_PATIENCE_S)
        raw = model.model_dump(mode="json")
        when_there_is_space(
            lambda: write_durably(self._work_dir / _COMPLETED_FILE, json.dumps(raw)),
            "Noting the end",
            tell=self._tier.tell,
            patience_s=DISK_PATIENCE_S,
        )
        self._is_successful = True
        self._events.tell("training_completed", model=raw)

    def _prepare_export(self) -> None:
        """Have the export import its libraries beside the last rounds, since that takes seconds."""
        if self._export is not None or not self._context.model_python:
            return
        missing = self._config.rounds - len(self._history)
        if missing <= 1 or (self._history and missing * self._history[-1].duration_s < _EXPORT_LEAD_S):
            self._export = self._start_export()

    def _start_export(self) -> ModelProcess:
        return self._child(
            self._context.model_python,
            "flops.trainer.export",
            (),
            doing="exports the model",
            code=ErrorCode.MODEL_EXPORT_FAILED,
            is_warm=True,
        )

    def _child(
        self,
        python: str,
        module: str,
        arguments: Sequence[str],
        *,
        doing: str,
        code: ErrorCode,
        is_warm: bool = False,
    ) -> ModelProcess:
        if not python:
            raise FlopsError(ErrorCode.INTERNAL, f"The service has no environment for what {doing}.")
        argv = [python, "-m", module, str(self._work_dir / CONTEXT_FILE), *arguments]
        if not self._context.has_open_network and network_rules.can_restrict():
            argv = [*network_rules.command([sys.executable], network_rules.__file__, (), ()), *argv]
        child = ModelProcess(
            argv,
            self._environ,
            doing=doing,
            code=code,
            reveal=self._context.disclosed,
            on_end=self._tier.server.wake,
            is_warm=is_warm,
        )
        self._children.append(child)
        return child

    # --- events ---

    def _tell_run(self, run: TrackedRun) -> None:
        self._events.tell(
            "training_started", experiment_id=run.experiment_id, run_id=run.run_id, tracking_url=run.url
        )


def _parse(context: ActorContext) -> AggregatorConfig:
    try:
        return AggregatorConfig.model_validate(context.config)
    except ValidationError as exc:
        problems = exc.errors(include_url=False)
        where = ".".join(str(part) for part in problems[0]["loc"])
        is_strategy = where.startswith("strategy")
        text = str(problems[0]["msg"]).removeprefix("Value error, ")
        raise FlopsError(
            ErrorCode.STRATEGY_INVALID if is_strategy else ErrorCode.INTERNAL, f"{where}: {text}."
        ) from exc


def _params_of(config: AggregatorConfig) -> dict[str, str]:
    """The run's parameters, by the ancestor's names where it had them."""
    rounds = "training_cycles" if config.has_clusters else "training_rounds"
    params: dict[str, Any] = {
        rounds: config.rounds,
        "min_available_clients": config.min_available_clients,
        "min_fit_clients": config.min_fit_clients,
        "min_evaluate_clients": config.min_evaluate_clients,
        "fraction_fit": 1.0,
        "fraction_evaluate": 1.0,
        "strategy": config.strategy.name.value,
        "round_timeout_s": config.round_timeout_s,
        "seed": config.seed,
        **{f"strategy.{key}": value for key, value in config.strategy.parameters.items()},
    }
    return {key: str(value) for key, value in params.items() if value is not None}
