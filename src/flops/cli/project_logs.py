"""``flops project logs``: what a project's services have written, once, or followed as they write it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flops.cli.output import print_line, say
from flops.core.cluster import ServiceKind, ServiceState
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.wire.rest import ServiceLog

_PAUSE_S = 1.0
_PIECE_BYTES = 1_048_576
_UNFINISHED_CHARACTERS = 65_536  # of a line without an end, which are shown although it may go on
_LAST_WORDS_S = 5.0  # after the project's end, for services that are still ending
_PASSING = frozenset({ErrorCode.UNREACHABLE, ErrorCode.NODE_LOST, ErrorCode.TIMEOUT})
_FINAL = frozenset(state.value for state in ServiceState if state.is_final)


def fetch_logs(
    api: ApiClient,
    project_id: str,
    service: str | None,
    after: Sequence[str] = (),
    tail_bytes: int | None = None,
) -> tuple[ServiceLog, ...]:
    """Outputs of a project's services, or of those of an id or a kind; see `flops.manager.project_logs`."""
    from flops.cli.api_client import project_path
    from flops.wire.rest import ProjectLogs

    path = f"{project_path(project_id)}/logs"
    return api.get(path, ProjectLogs, service=service, after=list(after), tail_bytes=tail_bytes).services


def show_logs(logs: Sequence[ServiceLog]) -> None:
    """Print outputs one after the other."""
    for log in logs:
        print_line(f"── {log.service_id} on {log.node}: {log.state}")
        if log.problem:
            print_line(f"(not available: {log.problem})")
        if log.start:
            print_line(f"… {log.start:,} bytes before this are not shown")
        if log.text:
            print_line(log.text.rstrip())


def follow_logs(api: ApiClient, project_id: str, service: str | None) -> None:
    """Print outputs as they grow, until the project has ended; every line that is shown is shown once.

    Restarts of services, of the node's daemon and of the manager are outlived.

    Raises:
        FlopsError: ``unreachable`` when the manager stays away for a minute; what the manager answers.
    """
    from flops.cli.api_client import GIVE_UP_AFTER_S

    printer = LogPrinter()
    over_since_s: float | None = None
    reached_at_s = time.monotonic()
    while True:
        has_more = False
        try:
            if api.project(project_id).stage.is_final and over_since_s is None:
                over_since_s = time.monotonic()
            tail_bytes = _PIECE_BYTES if printer.places else None
            logs = fetch_logs(api, project_id, service, printer.places, tail_bytes)
            has_more = printer.print_news(logs)
            has_ended = all(_has_ended(log, service) for log in logs)
        except FlopsError as error:
            is_away = error.code is ErrorCode.UNREACHABLE
            if not is_away:
                reached_at_s = time.monotonic()
            is_given_up = time.monotonic() - reached_at_s > GIVE_UP_AFTER_S or _is_past(over_since_s)
            if error.code not in _PASSING or is_given_up:
                raise
            printer.tell_problem("", f"{error.message} Waiting.")
            has_ended = False
        else:
            reached_at_s = time.monotonic()
            printer.forget_problem("")
        if over_since_s is not None and not has_more and (has_ended or _is_past(over_since_s)):
            printer.finish()
            return
        if not has_more:
            time.sleep(_PAUSE_S)


def _is_past(over_since_s: float | None) -> bool:
    return over_since_s is not None and time.monotonic() - over_since_s > _LAST_WORDS_S


def _has_ended(log: ServiceLog, service: str | None) -> bool:
    """Whether nothing more is waited for; a model is served on after its project has ended."""
    is_served_on = log.kind == ServiceKind.INFERENCE and service is None
    return log.state in _FINAL or is_served_on


@dataclass
class _Shown:
    place: int
    unfinished: str = ""  # the begin of a line whose end has not been written yet


class LogPrinter:
    """Prints pieces of outputs under the names of their services, in whole lines."""

    def __init__(self) -> None:
        self._shown: dict[str, _Shown] = {}
        self._problems: dict[str, str] = {}
        self._service = ""  # whose output was printed last

    @property
    def places(self) -> list[str]:
        """Where to go on, as `fetch_logs` takes it; everything of services that are not known yet."""
        known = [f"{service}:{shown.place}" for service, shown in self._shown.items()]
        return ["0", *known] if known else []

    def print_news(self, logs: Sequence[ServiceLog]) -> bool:
        """Print what is new; whether there is more to be had at once."""
        is_tail = not self._shown
        more = [self._print_piece(log, is_tail=is_tail) for log in logs]
        return any(more)

    def tell_problem(self, name: str, sentence: str) -> None:
        """Tell people, once, that there is no output to be had now."""
        if self._problems.get(name) != sentence:
            self._problems[name] = sentence
            say(f"── {sentence}")

    def forget_problem(self, name: str) -> None:
        """Have the same problem told again when it comes again."""
        self._problems.pop(name, None)

    def finish(self) -> None:
        """Print lines that will get no end any more."""
        for service, shown in self._shown.items():
            self._print(service, service, shown.unfinished)

    def _print_piece(self, log: ServiceLog, *, is_tail: bool) -> bool:
        if log.problem:
            self.tell_problem(log.service_id, f"{log.service_id}: {log.problem}")
            return False
        self.forget_problem(log.service_id)
        title = f"{log.service_id} on {log.node}"
        shown = self._shown.setdefault(log.service_id, _Shown(0))
        if log.start > shown.place:
            lost = log.start - shown.place + len(shown.unfinished.encode())
            what = "before this are not shown" if is_tail else "were dropped by rotation"
            shown.unfinished = ""
            self._print(log.service_id, title, f"… {lost:,} bytes {what}\n")
        elif log.start < shown.place:
            self._print(log.service_id, title, f"{shown.unfinished}\n… its output begins anew\n".lstrip("\n"))
            shown.unfinished = ""
        text = shown.unfinished + log.text
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        if len(text) - end > _UNFINISHED_CHARACTERS:
            end = len(text)
        shown.place, shown.unfinished = log.end, text[end:]
        self._print(log.service_id, title, text[:end])
        return bool(log.text) and log.end < log.total

    def _print(self, service: str, title: str, text: str) -> None:
        if not text:
            return
        if service != self._service:
            print_line(f"── {title}")
            self._service = service
        print_line(text.removesuffix("\n"))
