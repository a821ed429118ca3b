"""Several pieces of work at once, of which none is worth anything without the others."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from flops.command import StoppedError, stopped_when

T = TypeVar("T")


def at_once(works: Sequence[Callable[[], T]]) -> list[T]:
    """Do all of it in threads; returns what each gave, in order.

    The first failure stops the others within about 100 ms, and is raised. What makes this work needless makes
    its parts needless.
    """
    has_failed = threading.Event()

    def do(work: Callable[[], T]) -> T:
        try:
            with stopped_when(has_failed.is_set):
                return work()
        except BaseException:
            has_failed.set()
            raise

    with ThreadPoolExecutor(max(1, len(works))) as pool:
        begun = [pool.submit(contextvars.copy_context().run, do, work) for work in works]
    for each in sorted(begun, key=_is_stopped):  # what stopped the others is told first
        each.result()
    return [each.result() for each in begun]


def _is_stopped(work: Future[T]) -> bool:
    return isinstance(work.exception(), StoppedError)
