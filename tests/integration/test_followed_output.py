"""Output that is followed while its files rotate, and its service and its node's daemon are killed."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.cli.project_logs import LogPrinter
from flops.core.cluster import ServiceState
from flops.core.ids import ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.testing.waiting import until
from flops.wire.rest import ServiceLog

from .test_node_daemon import Cluster, PlayedNode

S1 = ServiceId("learner-p1-0")
LINES = 200_000  # of 160 bytes: twice what the two files keep
CRASH_AT = 150_000  # after two rotations; the output since is kept whole
FLOOD = (
    "import os, pathlib, sys\n"
    "path = pathlib.Path(context.work_dir) / 'next'\n"
    "start = int(path.read_text()) if path.exists() else 0\n"
    f"stop = min(start + {CRASH_AT}, {LINES})\n"
    "path.write_text(str(stop))\n"
    "for begin in range(start, stop, 1000):\n"
    "    sys.stdout.write(''.join(f'line {n:09d} {\"x\" * 144}\\n' for n in range(begin, begin + 1000)))\n"
    "sys.stdout.flush()\n"
    f"if stop < {LINES}: os.kill(os.getpid(), 11)\n"
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture
def node(tmp_path: Path, cluster: Cluster) -> Iterator[PlayedNode]:
    node = PlayedNode(tmp_path / "home", cluster.port)
    node.start()
    until(cluster.is_connected, "joined")
    yield node
    node.close()


class Follower:
    """Follows S1 as `flops project logs --follow` does."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._printer = LogPrinter()
        self._place = 0
        self.is_behind = True

    def look(self, piece_bytes: int) -> None:
        """Print the next piece, if the node is there to send it."""
        try:
            output = self._cluster.orchestrator.service_logs(S1, after=self._place, tail_bytes=piece_bytes)
        except FlopsError as error:
            if error.code not in {ErrorCode.NODE_LOST, ErrorCode.TIMEOUT}:
                raise
            return
        log = ServiceLog(service_id=S1, kind="learner", node="n", state="running")
        self._printer.print_news([log.model_copy(update=dict(output))])
        self._place, self.is_behind = output.end, output.end < output.total


def test_every_line_is_shown_once_and_in_order_or_counted_as_dropped(
    node: PlayedNode, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.run(FLOOD, max_restarts=1)
    follower = Follower(cluster)
    follower.look(1_000)
    before = node.home / f"logs/{S1}.log.1"
    until(lambda: before.exists() and before.read_bytes()[:6] == "──".encode(), "two rotations")
    follower.look(1_000)
    node.kill()
    node.start()
    until(lambda: not follower.look(1_048_576) and cluster.status(S1).restarts == 1, "the restart")
    until(
        lambda: (
            not follower.look(1_048_576)
            and cluster.status(S1).state is ServiceState.COMPLETED
            and not follower.is_behind
        ),
        "the end of the output",
        timeout_s=60,
    )
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"── {S1} on n"
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == LINES - 1
    assert all(len(line) == 159 for line in lines if line.startswith("line "))
    told = [line for line in lines if not line.startswith("line ")]
    (restart,) = [line for line in told if line.startswith("── started again (attempt 2): ")]
    assert signal.Signals(11).name in restart
    dropped = [re.fullmatch(r"… ([0-9,]+) bytes were dropped by rotation", line) for line in told]
    lost_bytes = sum(int(match[1].replace(",", "")) for match in dropped if match is not None)
    assert lost_bytes > 0
    assert len(told) == 1 + sum(match is not None for match in dropped)
    shown_bytes = sum(len(f"{line}\n".encode()) for line in lines if line not in told or line == restart)
    assert shown_bytes + lost_bytes == cluster.orchestrator.service_logs(S1, after=0).total


def test_output_stays_after_the_end_and_over_a_new_daemon(node: PlayedNode, cluster: Cluster) -> None:
    cluster.run("print('the last words')")
    cluster.wait_for(ServiceState.COMPLETED)
    node.stop()
    with pytest.raises(FlopsError, match="which has learner-p1-0, is away") as caught:
        cluster.orchestrator.service_logs(S1)
    assert caught.value.code is ErrorCode.NODE_LOST
    node.start()
    until(cluster.is_connected, "joined again")
    assert cluster.orchestrator.service_logs(S1).text == "the last words\n"
