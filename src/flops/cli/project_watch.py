"""Follows a project: a live view on a terminal, one line an event elsewhere; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from textwrap import indent
from typing import TYPE_CHECKING, Protocol

from flops.adapters.system_clock import SystemClock
from flops.cli.output import duration, hide_passwords, say
from flops.cli.project_view import durations, metric
from flops.core.learner_states import last_words
from flops.core.project import Failure, Project, ProjectEvent, Stage, Training
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.spinner import Spinner

    from flops.cli.api_client import ApiClient


class Report(Protocol):
    """Where the events of a watched project go."""

    def tell(self, event: ProjectEvent) -> None:
        """Show an event."""
        ...

    def note(self, sentence: str) -> None:
        """Show something that is not an event."""
        ...


def watch_project(api: ApiClient, project_id: str) -> Project:
    """Follow a project until it has ended, also over restarts of the manager.

    Returns:
        The completed project.

    Raises:
        FlopsError: the project's failure; ``conflict`` when it was stopped; ``project_not_found`` when it is
            unknown or was deleted; ``unreachable`` when the manager stays away.
    """
    project = api.project(project_id)
    try:
        with _report(api, project) as report:
            events = api.follow(
                project_id,
                on_gap=lambda error: report.note(_gap(error)),
                on_return=lambda: report.note("The manager answers again."),
            )
            for event in events:
                report.tell(event)
            project = api.project(project_id)
    except KeyboardInterrupt:
        say(f"The project goes on. Watch it again with `flops project watch {project_id}`.")
        raise
    if project.failure is not None and project.stage is Stage.FAILED:
        raise _error_of(project.id, project.failure)
    if project.stage is Stage.STOPPED:
        raise FlopsError(
            ErrorCode.CONFLICT,
            f"Project {project_id} was stopped before it was completed.",
            hint="Submit it again with `flops project create`.",
            details={"project_id": project_id},
        )
    return project


def _error_of(project_id: str, failure: Failure) -> FlopsError:
    error = FlopsError.from_dict(failure.model_dump())
    error.details.setdefault("project_id", project_id)
    return error


def _gap(error: FlopsError) -> str:
    return f"{error.message} The project goes on; waiting for the manager."


@contextmanager
def _report(api: ApiClient, project: Project) -> Iterator[Report]:
    if not _is_terminal():
        yield LineReport()
        return
    from rich.console import Console
    from rich.live import Live

    report = LiveReport(api, project, Console(file=sys.stderr))
    with Live(
        console=report.console, get_renderable=report.render, refresh_per_second=4, transient=True
    ) as live:
        yield report
        live.refresh()


def _is_terminal() -> bool:
    return sys.stderr.isatty()


class LineReport:
    """One line an event, for logs and pipes."""

    def tell(self, event: ProjectEvent) -> None:
        """Print an event."""
        say(f"{_clock_time(event.time_s)}  {_text_of(event)}")

    def note(self, sentence: str) -> None:
        """Print a sentence."""
        say(f"{_clock_time(None)}  {sentence}")


class LiveReport:
    """Events scroll by above a view of the project's state that is drawn anew several times a second."""

    def __init__(self, api: ApiClient, project: Project, console: Console) -> None:
        self.console = console
        self._api = api
        self._project = project
        self._stage_begun = time.monotonic()
        self._spinner: Spinner | None = None  # kept, so that it goes on turning from one drawing to the next

    def tell(self, event: ProjectEvent) -> None:
        """Print an event and bring the view up to date."""
        stage = self._project.stage
        with suppress(FlopsError):
            self._project = self._api.project(self._project.id)
        if self._project.stage is not stage:
            self._stage_begun = time.monotonic()
        self._print(_clock_time(event.time_s), _text_of(event))

    def note(self, sentence: str) -> None:
        """Print a sentence."""
        self._print(_clock_time(None), sentence)

    def render(self) -> RenderableType:
        """The view: stage, what it does, rounds with their numbers, durations so far."""
        from rich.console import Group
        from rich.padding import Padding
        from rich.spinner import Spinner
        from rich.text import Text

        project = self._project
        if self._spinner is None:
            self._spinner = Spinner("dots")
        elapsed = time.monotonic() - self._stage_begun
        self._spinner.update(text=Text.assemble((str(project.stage), "bold"), f"  {elapsed:.0f} s"))
        parts: list[RenderableType] = [
            self._spinner,
            Text(hide_passwords(_doing(project)), style="dim"),
        ]
        if project.training is not None:
            parts.append(_progress(project.training))
        if spent := durations(project):
            parts.append(Text(spent, style="dim"))
        return Padding(Group(*parts), (1, 0, 0, 2))

    def _print(self, when: str, sentence: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble((when, "dim"), "  ", hide_passwords(sentence)), soft_wrap=True)


def _text_of(event: ProjectEvent) -> str:
    """The event's sentence, with the traceback of a learner whose code failed while the project goes on."""
    words = last_words(event) if event.kind == "learner_failed" else ""
    return f"{event.message}\n{indent(words, '    ')}" if words else event.message


def _doing(project: Project) -> str:
    """What the project does, and for how long."""
    if not project.doing_since_s or project.stage.is_final:
        return project.doing
    return f"{project.doing} ({duration(SystemClock().now_s() - project.doing_since_s)})"


def _clock_time(seconds: float | None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return f"{moment.astimezone():%H:%M:%S}"


def _progress(training: Training) -> RenderableType:
    from rich.columns import Columns
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    done = len(training.history)
    clusters = sum(cluster.is_joined for cluster in training.clusters)
    what = f"cycles, {clusters} clusters" if training.clusters else "rounds"
    label = f"{done} of {training.rounds_total} {what}, {len(training.learners)} learners"
    if training.history:
        last = training.history[-1]
        label += f", accuracy {metric(last.accuracy) or '-'}, loss {metric(last.loss) or '-'}"
    bar = ProgressBar(total=max(training.rounds_total, 1), completed=done, width=30)
    return Columns([bar, Text(label)])
