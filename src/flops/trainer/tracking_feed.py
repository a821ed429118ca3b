"""Tracking beside the training: rounds are recorded in a thread of their own, in order, each once or more.

A tracking server that is away delays no round: what it missed is recorded when it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flops.core.ids import ProjectId
from flops.core.project import Round
from flops.errors import ErrorCode, FlopsError
from flops.tracker_port import Tracker
from flops.trainer.delivery import AWAY

_log = logging.getLogger(__name__)
_FIRST_BACK_OFF_S = 0.1
_LONGEST_BACK_OFF_S = 5.0


@dataclass(frozen=True)
class TrackedRun:
    """The run, once it is open."""

    experiment_id: str
    run_id: str
    url: str


class TrackingFeed:
    """Feeds a tracker.

    Args:
        make_tracker: makes the tracker; called in the thread, because that may be slow.
        project_id: whose experiment it is.
        params: parameters of the run.
        tags: tags of the run.
        on_open: is told when the run is open.
    """

    def __init__(
        self,
        make_tracker: Callable[[], Tracker],
        project_id: ProjectId,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        on_open: Callable[[TrackedRun], None],
    ) -> None:
        self._make_tracker = make_tracker
        self._project_id = project_id
        self._params = params
        self._tags = tags
        self._on_open = on_open
        self._changed = threading.Condition()
        self._rounds: list[Round] = []
        self._recorded = 0
        self._is_closing = False
        self._tracker: Tracker | None = None
        self._run: TrackedRun | None = None
        self._problem: FlopsError | None = None
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def add(self, records: Sequence[Round]) -> None:
        """Have finished rounds recorded."""
        with self._changed:
            self._rounds.extend(records)
            self._changed.notify_all()

    def wait(self, patience_s: float, *, away_patience_s: float = 0.0) -> tuple[Tracker, TrackedRun]:
        """Wait until everything is recorded.

        Args:
            patience_s: how long to wait.
            away_patience_s: how long to wait, if that is longer, for a server that was there and does
                not answer any more. One that never was there may have been named wrongly.

        Raises:
            FlopsError: ``tracking_failed``, with what the tracking server's last problem was.
        """
        away_deadline_s = time.monotonic() + away_patience_s
        with self._changed:
            while not self._changed.wait_for(self._is_all_recorded, patience_s):
                if not self._was_there_and_is_away() or time.monotonic() > away_deadline_s:
                    break
            if self._is_all_recorded() and self._tracker is not None and self._run is not None:
                return self._tracker, self._run
            why = self._problem.message if self._problem else "it has not answered"
            raise FlopsError(
                ErrorCode.TRACKING_FAILED,
                f"{len(self._rounds) - self._recorded} rounds could not be recorded within {patience_s:g} s: "
                f"{why}",
            )

    def close(self, *, has_failed: bool, patience_s: float) -> None:
        """Stop recording; never raises. A failed training's run is ended if the server answers in time."""
        try:
            if has_failed:
                tracker, run = self.wait(patience_s)
                tracker.close_run(run.run_id, is_success=False)
        except FlopsError as exc:
            _log.warning("the run was left open: %s", exc)
        finally:
            with self._changed:
                self._is_closing = True
                self._changed.notify_all()
            self._thread.join(patience_s)

    def _is_all_recorded(self) -> bool:
        return self._run is not None and self._recorded == len(self._rounds)

    def _was_there_and_is_away(self) -> bool:
        return self._run is not None and self._problem is not None and self._problem.code in AWAY

    def _work(self) -> None:
        back_off_s = _FIRST_BACK_OFF_S
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closing or self._run is None or self._recorded < len(self._rounds)
                )
                if self._is_closing:
                    return
            try:
                self._step()
                back_off_s = _FIRST_BACK_OFF_S
            except Exception as exc:  # noqa: BLE001 (whatever it is: the thread goes on, and `wait` tells it)
                _log.warning("tracking: %s", exc)
                with self._changed:
                    self._problem = _as_error(exc)
                    if self._changed.wait_for(lambda: self._is_closing, back_off_s):
                        return
                back_off_s = min(2 * back_off_s, _LONGEST_BACK_OFF_S)

    def _step(self) -> None:
        """Open the run, or record the next round."""
        tracker = self._tracker = self._tracker or self._make_tracker()
        if self._run is None:
            experiment_id, run_id = tracker.open_run(self._project_id, self._params, self._tags)
            run = TrackedRun(experiment_id, run_id, tracker.url_of(experiment_id, run_id))
            self._on_open(run)
            with self._changed:
                self._run = run
                self._changed.notify_all()
            return
        tracker.log_round(self._run.run_id, self._rounds[self._recorded])
        with self._changed:
            self._recorded += 1
            self._changed.notify_all()


def _as_error(exc: Exception) -> FlopsError:
    if isinstance(exc, FlopsError):
        return exc
    return FlopsError(ErrorCode.TRACKING_FAILED, f"{type(exc).__name__}: {exc}")
