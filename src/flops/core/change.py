"""One step of a project while it is being made: what changes, what is told, what is to be done."""

from __future__ import annotations

from typing import Any

from flops.core.effects import Effect, EffectKind
from flops.core.events import LifecycleEvent
from flops.core.ids import ProjectId
from flops.core.model import Value
from flops.core.project import Project, ProjectEvent, Stage, StageSpan


class Step(Value):
    """The result of a step; `history` and `effects` are to be stored together with `project`."""

    project: Project
    effects: tuple[Effect, ...] = ()
    history: tuple[ProjectEvent, ...] = ()
    is_changed: bool = True


class Change:
    """Collects the step of one event.

    Args:
        project: the project before the event.
        event: what happened.
        now_s: when, in seconds since the epoch.
    """

    def __init__(self, project: Project, event: LifecycleEvent, now_s: float) -> None:
        self.project = project
        self._before = project
        self._event = event
        self._now_s = now_s
        self._effects: list[Effect] = []
        self._history: list[ProjectEvent] = []

    def set(self, **fields: Any) -> None:
        """Change fields of the project; a new `doing` begins now."""
        if fields.get("doing", self.project.doing) != self.project.doing:
            fields["doing_since_s"] = self._now_s
        self.project = self.project.model_copy(update=fields)

    def enter(self, stage: Stage, doing: str) -> None:
        """Move to a stage; `doing` says what the project does or waits for there."""
        span = StageSpan(stage=stage, entered_at_s=self._now_s)
        self.set(stage=stage, doing=doing, spans=(*self.project.spans, span))

    def note(self, message: str, *, kind: str | None = None, **data: Any) -> None:
        """Add a line to the history.

        Args:
            message: one sentence for people.
            kind: the line's kind, the event's name when None.
            data: machine-readable facts, JSON types only.
        """
        seq = self.project.history_length + 1
        self._history.append(
            ProjectEvent(
                project_id=self.project.id,
                seq=seq,
                time_s=self._now_s,
                kind=kind or self._event.name,
                message=message,
                data=data,
            )
        )
        self.set(history_length=seq)

    def request(self, kind: EffectKind, **payload: Any) -> None:
        """Have an effect run after the step is stored."""
        self._request(kind, self.project.id, payload)

    def request_beyond_end(self, kind: EffectKind) -> None:
        """Have an effect run that is not forgotten with the project; its payload has the project's id."""
        self._request(kind, ProjectId(""), {"project_id": self.project.id})

    def _request(self, kind: EffectKind, owner: ProjectId, payload: dict[str, Any]) -> None:
        """The key holds the version that the step makes: one is stored once, so the key is used once."""
        key = f"{self.project.id}:{self._before.version + 1}:{len(self._effects)}:{kind.value}"
        self._effects.append(Effect(key=key, project_id=owner, kind=kind, payload=payload))

    def finish(self) -> Step:
        """The step; nothing at all when nothing changed."""
        if self.project == self._before and not self._effects:
            return Step(project=self._before, is_changed=False)
        self.set(
            version=self._before.version + 1,
            updated_at_s=self._now_s,
            cluster_seq=max(self._before.cluster_seq, self._event.seq),
        )
        return Step(project=self.project, effects=tuple(self._effects), history=tuple(self._history))
