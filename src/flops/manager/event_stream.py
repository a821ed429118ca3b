"""A project's history as server-sent events, past and live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool

from flops.core.ids import ProjectId
from flops.core.project import ProjectEvent
from flops.errors import ErrorCode, FlopsError
from flops.manager.engine import Engine

HEARTBEAT_S = 10.0


async def stream_events(
    engine: Engine, project_id: ProjectId, *, after: int, is_followed: bool, heartbeat_s: float = HEARTBEAT_S
) -> AsyncIterator[str]:
    """The events above `after`; followed until the project has ended or is deleted.

    A comment is sent when nothing happens for `heartbeat_s`, so that both sides notice a dead connection.
    The stream also ends with the engine; clients come back with ``Last-Event-ID``.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()

    def wake(about: ProjectId) -> None:
        if about in {project_id, ""} and not loop.is_closed():
            loop.call_soon_threadsafe(changed.set)

    end = engine.subscribe(wake)
    try:
        while not engine.is_closed:
            changed.clear()
            events, is_over = await run_in_threadpool(_read, engine, project_id, after)
            for event in events:
                after = event.seq
                yield _frame(event)
            if is_over or not is_followed:
                return
            try:
                await asyncio.wait_for(changed.wait(), heartbeat_s)
            except TimeoutError:
                yield ": still here\n\n"
    finally:
        end()


def _read(engine: Engine, project_id: ProjectId, after: int) -> tuple[list[ProjectEvent], bool]:
    try:
        project = engine.get(project_id)
    except FlopsError as exc:
        if exc.code is ErrorCode.PROJECT_NOT_FOUND:  # deleted while it was watched
            return [], True
        raise
    events = engine.history(project_id, after=after)
    last = events[-1].seq if events else after
    return events, project.stage.is_final and last >= project.history_length


def _frame(event: ProjectEvent) -> str:
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
