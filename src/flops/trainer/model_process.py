"""Children of the aggregator that run the user's code in the project's environments."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from flops.errors import ErrorCode, FlopsError

PATIENCE_S = 1_800.0  # for user code that makes a model, or its export
_END_PATIENCE_S = 5.0
_TAIL_CHARACTERS = 2_000
_KILLED = -9


class ModelProcess:
    """A child that does one thing and ends; its output goes on to the aggregator's.

    A child that is killed is started again once: a kill from outside says nothing about the user's code.

    Args:
        argv: the command.
        env: the child's whole environment.
        doing: what it does, in words that follow "The process that …", for messages.
        code: error when it ends badly without telling why.
        reveal: what of such an error may leave the node.
        on_end: called, in another thread, when it has ended.
        is_warm: it prepares itself, and does its work when it gets its orders; see `order`.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        doing: str,
        code: ErrorCode,
        reveal: Callable[[FlopsError], FlopsError] = lambda error: error,
        on_end: Callable[[], None] = lambda: None,
        is_warm: bool = False,
    ) -> None:
        self._doing = doing
        self._code = code
        self._reveal = reveal
        self._result: Future[None] = Future()
        self._argv, self._env = argv, dict(env)
        self._lock = threading.Lock()
        self._is_unwanted = False
        self._orders: bytes | None = None
        self._is_warm = is_warm
        self._stdin: int | None = None  # our end of its standard input, until it has its orders
        self._process = self._start()
        self._result.add_done_callback(lambda _: on_end())
        self._thread = threading.Thread(target=self._watch, name="model-process", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended with a failure."""
        return self._result.done() and self._result.exception() is not None

    def order(self, *lines: str) -> None:
        """Give a warm child, and one that is started in its place, its orders: lines on standard input."""
        with self._lock:
            self._orders = "".join(f"{line}\n" for line in lines).encode()
            self._hand_over()

    def wait(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait for its end; after `timeout_s` it is killed.

        Raises:
            FlopsError: what the child told, or the code given when it told nothing or did not end.
        """
        try:
            self._result.result(timeout_s)
        except TimeoutError as exc:
            self.kill()
            raise FlopsError(
                self._code,
                f"The process that {self._doing} did not end within {timeout_s:g} s, and was killed.",
                hint="Look for an endless loop in the repository's code, or have it do less there.",
            ) from exc

    def kill(self) -> None:
        """End it if it still runs."""
        with self._lock, contextlib.suppress(OSError):
            self._is_unwanted = True
            self._close_stdin()
            self._process.kill()
        self._thread.join(_END_PATIENCE_S)  # not for good: a process that it left may hold its output open

    def _start(self) -> subprocess.Popen[str]:
        # A pipe of our own: that of Popen would be closed by communicate() before there are orders.
        theirs, ours = os.pipe() if self._is_warm else (subprocess.DEVNULL, None)
        self._close_stdin()
        self._stdin = ours
        try:
            process = subprocess.Popen(
                self._argv,
                env=self._env,
                stdin=theirs,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as exc:
            self._close_stdin()
            raise FlopsError(self._code, f"The process that {self._doing} cannot be started: {exc}.") from exc
        finally:
            if ours is not None:
                os.close(theirs)
        self._hand_over()
        return process

    def _hand_over(self) -> None:
        if self._orders is not None and self._stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it has ended, and its end says why
                os.write(self._stdin, self._orders)
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._stdin is not None:
            os.close(self._stdin)
            self._stdin = None

    def _watch(self) -> None:
        _, errors = self._process.communicate()
        if self._process.returncode == _KILLED and self._start_again():
            _, errors = self._process.communicate()
        error = None if self._process.returncode == 0 else self._error_of(errors)
        told = errors.rstrip().rpartition("\n")[0] if error is not None else errors.rstrip()
        if told:
            sys.stderr.write(told + "\n")
        if error is None:
            self._result.set_result(None)
        else:
            self._result.set_exception(error)

    def _start_again(self) -> bool:
        with self._lock:
            if self._is_unwanted:
                return False
            sys.stderr.write(f"The process that {self._doing} was killed, and is started again.\n")
            try:
                self._process = self._start()
            except FlopsError as exc:
                sys.stderr.write(f"{exc}\n")
                return False
            return True

    def _error_of(self, errors: str) -> FlopsError:
        with contextlib.suppress(ValueError, AttributeError):
            return FlopsError.from_dict(json.loads(errors.rstrip().rpartition("\n")[2]))
        status = self._process.returncode
        reason = (
            "was killed twice from outside, by the operating system for want of memory, or by someone"
            if status == _KILLED
            else f"ended with {status}"
        )
        error = FlopsError(
            self._code,
            f"The process that {self._doing} {reason}.",
            details={"exit_code": status, "traceback": errors[-_TAIL_CHARACTERS:]},
        )
        return self._reveal(error)
