"""The aggregator: waits for learners, runs the rounds, and hands over the best model.

Runs in FLOps' own environment: ``python -m flops.wiring aggregator CONTEXT.json``. Started again in the same
work folder, it goes on after the last finished round, on the same port if it is free.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flops.actor import CONTEXT_FILE, ActorContext, EventLog
from flops.core.ids import ProjectId
from flops.core.project import Round
from flops.core.rounds import Part, best_round, has_numbers, reason_to_end
from flops.durable_file import write_durably
from flops.errors import ErrorCode, FlopsError
from flops.tracker_port import Tracker
from flops.trainer.checkpoint import CheckpointStore
from flops.trainer.delivery import keep_best, pack, patiently, store_bundle
from flops.trainer.disk_patience import PATIENCE_S as DISK_PATIENCE_S
from flops.trainer.disk_patience import when_there_is_space
from flops.trainer.gathering import JOIN_PATIENCE_S, Gathering
from flops.trainer.links import LearnerServer, Link, Loader
from flops.trainer.ml_repo import read_parameters
from flops.trainer.model_process import ModelProcess
from flops.trainer.round_runner import RoundRunner
from flops.trainer.strategy import RoundStrategy
from flops.trainer.tracking_feed import TrackedRun, TrackingFeed
from flops.wire.services import AggregatorConfig
from flops.wire.training import Array

_log = logging.getLogger(__name__)
_REJOIN_PATIENCE_S = 10.0  # of a restarted aggregator, for learners beyond the needed ones
_TRACKING_PATIENCE_S = 300.0
_STORE_PATIENCE_S = 300.0
_AWAY_PATIENCE_S = 86_400.0  # of the two above: a network may be down for hours, and nothing is lost for it
_CLOSE_PATIENCE_S = 3.0
_PORT_FILE = "port"
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
    completed = Path(context.work_dir) / _COMPLETED_FILE
    if completed.exists():  # nothing is left to do; the run, which has its end, stays as it is
        events.tell("training_completed", model=json.loads(completed.read_text()))
        return
    _on_sigterm(signal.default_int_handler)  # a stopped project's run is closed, too
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
        self._strategy = RoundStrategy(config.strategy)
        self._store = CheckpointStore(self._work_dir / "checkpoint")
        self._history: list[Round] = []
        self._children: list[ModelProcess] = []
        self._is_successful = False
        self._server = self._listen()
        self._gathering = Gathering(self._server, config, tell=self._tell, patience_s=join_patience_s)
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
        runner = RoundRunner(
            self._server,
            self._strategy,
            self._config,
            tell=self._tell,
            on_start=self._tell_round,
            on_failure=self._tell_failure,
        )
        while not self._is_over():
            finished = runner.run(len(self._history) + 1, parameters)
            parameters = finished.parameters
            self._history.append(finished.record)
            self._save(parameters)
            self._tell_completed(finished.record)
            if not has_numbers(finished.record):
                self._tell(
                    f"Round {len(self._history)} has no finite accuracy or loss; it cannot be the best."
                )
            self._feed.add([finished.record])
        if (reason := self._reason_to_end()) is not None:
            self._tell(f"{reason} The training ends here.")
        self._deliver()

    def close(self) -> None:
        """End what was started: children, the run, the learners' connections."""
        for child in self._children:
            child.kill()
        self._feed.close(has_failed=not self._is_successful, patience_s=_CLOSE_PATIENCE_S)
        self._server.stop(is_over=self._is_successful)

    # --- beginning ---

    def _listen(self) -> LearnerServer:
        """Listen on the port of an earlier start if it is free: the learners dial it."""
        earlier = 0
        with contextlib.suppress(OSError, ValueError):
            earlier = int((self._work_dir / _PORT_FILE).read_text())
        server = self._server_on(earlier) if earlier else None
        server = server or self._server_on(0)
        if server is None:
            raise FlopsError(ErrorCode.PORT_OCCUPIED, f"No port is free on {self._context.host}.")
        write_durably(self._work_dir / _PORT_FILE, str(server.port))
        self._events.tell("listening", address=f"{self._context.host}:{server.port}")
        return server

    def _server_on(self, port: int) -> LearnerServer | None:
        try:
            return LearnerServer(
                self._context.host,
                port,
                self._config.learner_token,
                on_join=self._tell_join,
                on_leave=self._tell_leave,
                on_lost_loader=self._tell_lost_loader,
            )
        except FlopsError as exc:
            _log.warning("%s", exc)
            return None

    def _begin(self) -> list[Array]:
        """Wait for the learners, and get the parameters to go on from."""
        checkpoint = self._store.load()
        if checkpoint is not None:
            self._history = list(checkpoint.history)
            self._strategy.restore(checkpoint.strategy_state)
            self._tell_completed(self._history[-1])  # it may have been killed before it had told it
            self._feed.add(self._history)
            if not self._is_over():
                self._tell(f"Going on after round {len(self._history)} of {self._config.rounds}.")
                self._await_return()
            return checkpoint.parameters
        target = self._work_dir / "first.npz"
        child = self._child(
            self._context.project_python,
            "flops.trainer.model_host",
            (str(target),),
            doing="makes the model's first parameters",
            code=ErrorCode.USER_CODE_FAILED,
        )
        self._gathering.wait(lambda: child.has_failed)
        child.wait()
        return read_parameters(target)

    def _await_return(self) -> None:
        """After a restart: give all learners the time to dial again; the rounds need fewer."""
        self._server.wait_until(
            lambda: len(self._server.joined()) >= self._config.min_available_clients, _REJOIN_PATIENCE_S
        )

    def _is_over(self) -> bool:
        return self._reason_to_end() is not None or len(self._history) >= self._config.rounds

    def _reason_to_end(self) -> str | None:
        return reason_to_end(self._history, self._config.target_metric, self._config.early_stopping)

    def _save(self, parameters: list[Array]) -> None:
        when_there_is_space(
            lambda: self._store.save(parameters, self._strategy.state(), self._history),
            f"Saving round {len(self._history)}",
            tell=self._tell,
            patience_s=DISK_PATIENCE_S,
        )

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
        self._tell(f"Saving the model of round {best.number}, the best one.")
        parameters, folder = self._work_dir / "best.npz", self._work_dir / f"model-{best.number}"
        when_there_is_space(
            lambda: keep_best(self._store.parameters_file(best.number), parameters),
            "Keeping the best parameters",
            tell=self._tell,
            patience_s=DISK_PATIENCE_S,
        )
        if not folder.exists():  # a folder is whole or not there; this is a restart when it is there
            child = self._child(
                self._context.model_python,
                "flops.trainer.export",
                (str(parameters), str(folder)),
                doing="exports the model",
                code=ErrorCode.MODEL_EXPORT_FAILED,
            )
            child.wait()
        tracker, run = self._feed.wait(_TRACKING_PATIENCE_S, away_patience_s=_AWAY_PATIENCE_S)
        model = patiently(
            lambda: tracker.log_model(run.run_id, folder, best, self._config.model_name),
            _TRACKING_PATIENCE_S,
            away_patience_s=_AWAY_PATIENCE_S,
        )
        if self._context.blobs_url:
            bundle, url = pack(folder), self._context.blobs_url
            digest = store_bundle(bundle, url, _STORE_PATIENCE_S, away_patience_s=_AWAY_PATIENCE_S)
            model = model.model_copy(update={"bundle": digest})
        patiently(lambda: tracker.close_run(run.run_id, is_success=True), _TRACKING_PATIENCE_S)
        raw = model.model_dump(mode="json")
        when_there_is_space(
            lambda: write_durably(self._work_dir / _COMPLETED_FILE, json.dumps(raw)),
            "Noting the end",
            tell=self._tell,
            patience_s=DISK_PATIENCE_S,
        )
        self._is_successful = True
        self._events.tell("training_completed", model=raw)

    def _child(
        self, python: str, module: str, arguments: Sequence[str], *, doing: str, code: ErrorCode
    ) -> ModelProcess:
        if not python:
            raise FlopsError(ErrorCode.INTERNAL, f"The service has no environment for what {doing}.")
        argv = [python, "-m", module, str(self._work_dir / CONTEXT_FILE), *arguments]
        child = ModelProcess(
            argv,
            self._environ,
            doing=doing,
            code=code,
            reveal=self._context.disclosed,
            on_end=self._server.wake,
        )
        self._children.append(child)
        return child

    # --- events ---

    def _tell(self, message: str) -> None:
        self._events.tell("progress", message=message)

    def _tell_run(self, run: TrackedRun) -> None:
        self._events.tell(
            "training_started", experiment_id=run.experiment_id, run_id=run.run_id, tracking_url=run.url
        )

    def _tell_round(self, number: int, learners: Sequence[str]) -> None:
        self._events.tell("round_started", round=number, rounds=self._config.rounds, learners=list(learners))

    def _tell_completed(self, record: Round) -> None:
        self._events.tell(
            "round_completed", rounds=self._config.rounds, record=record.model_dump(mode="json")
        )

    def _tell_failure(self, number: int, phase: str, part: Part) -> None:
        self._events.tell(
            "learner_failed",
            learner=part.learner,
            node=part.node,
            round=number,
            phase=phase,
            error=part.error,
        )

    def _tell_join(self, link: Link) -> None:
        self._events.tell("learner_joined", learner=link.learner, node=link.node, rows=link.rows)

    def _tell_leave(self, link: Link, reason: str) -> None:
        self._events.tell("learner_left", learner=link.learner, node=link.node, reason=reason)

    def _tell_lost_loader(self, loader: Loader) -> None:
        self._tell(f"{loader.learner} on {loader.node} has gone while it loaded its code and data.")


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
    params: dict[str, Any] = {
        "training_rounds": config.rounds,
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
