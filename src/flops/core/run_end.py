"""How a project's end looks in the record of its training. Pure."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from flops.core.model import Value
from flops.core.project import Failure, Project, Stage

_LOCATIONS = ("node", "learner", "service_id", "round")  # of a failure's details, as they stand in tags


class RunStatus(StrEnum):
    """How a run has ended, by MLflow's names."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"  # somebody stopped the project


class RunEnd(Value):
    """The end of a training's run."""

    status: RunStatus
    summary: str  # for people, Markdown
    tags: dict[str, str] = Field(default_factory=dict)
    failure: str = ""  # the whole failure as text, with its traceback; "" when nothing failed


def run_end_of(project: Project) -> RunEnd:
    """The end of an ended project's run. A training that was completed stays so, whatever failed later."""
    if project.failure is not None:
        status = RunStatus.FAILED
        summary = f"**Failed**{_where(project.failure)}: {project.failure.message}"
    elif project.stage is Stage.COMPLETED:
        return RunEnd(status=RunStatus.FINISHED, summary="Completed.")
    else:
        status, summary = RunStatus.KILLED, "**Stopped** because somebody asked for it."
    if project.model is not None:
        status = RunStatus.FINISHED
        summary = f"The training is completed; the project was not: {summary}"
    if project.failure is None:
        return RunEnd(status=status, summary=summary)
    return RunEnd(
        status=status,
        summary=f"{summary}\n\nThe artifact failure.txt has all that is known.",
        tags=_tags(project.failure),
        failure=_text(project.failure),
    )


def _where(failure: Failure) -> str:
    details = failure.details
    parts = [f"on {details['node']}"] if details.get("node") else []
    parts += [f"in round {details['round']}"] if details.get("round") else []
    return f" {' '.join(parts)}" if parts else ""


def _tags(failure: Failure) -> dict[str, str]:
    found = {"code": failure.code, "message": failure.message}
    found |= {name: str(failure.details[name]) for name in _LOCATIONS if failure.details.get(name)}
    return {f"flops.failure.{name}": value for name, value in found.items()}


def _text(failure: Failure) -> str:
    lines = [f"{failure.code}: {failure.message}"]
    lines += [f"Hint: {failure.hint}"] if failure.hint else []
    short = {k: v for k, v in failure.details.items() if not (isinstance(v, str) and "\n" in v)}
    lines += [f"{name}: {value}" for name, value in short.items()]
    for name, value in failure.details.items():
        if name not in short:
            lines += ["", f"{name}:", str(value).rstrip()]
    return "\n".join(lines) + "\n"
