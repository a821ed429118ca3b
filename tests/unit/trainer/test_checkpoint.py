"""What was saved is there, whole, also after a kill at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flops.core.project import Participant, Round
from flops.errors import ErrorCode, FlopsError
from flops.trainer.checkpoint import CheckpointStore
from flops.wire.training import Array


def history(*accuracies: float) -> list[Round]:
    return [Round(number=n, accuracy=a, loss=1 - a) for n, a in enumerate(accuracies, 1)]


def save(store: CheckpointStore, records: list[Round], state: dict[str, Array] | None = None) -> None:
    number = float(records[-1].number)
    store.save([np.full(3, number, np.float32), np.array(number)], state or {}, records)


def test_there_is_none_at_first(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none").load() is None


def test_the_last_round_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    records = history(0.1, 0.5, 0.3)
    records[1] = records[1].model_copy(update={"participants": (Participant(learner="a", node="n"),)})
    for length in (1, 2, 3):
        save(store, records[:length], {"m_t/0": np.array([float(length)])})
    found = CheckpointStore(tmp_path).load()
    assert found is not None
    assert found.history == tuple(records)
    assert [a.dtype for a in found.parameters] == [np.float32, np.float64]
    np.testing.assert_array_equal(found.parameters[0], [3, 3, 3])
    np.testing.assert_array_equal(found.strategy_state["m_t/0"], [3])


def test_only_the_last_and_the_best_parameters_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    records = history(0.1, 0.5, 0.3, 0.2)
    for length in range(1, 5):
        save(store, records[:length])
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["round-2.npz", "round-4.npz"]
    with np.load(store.parameters_file(2)) as best:
        assert best.files == ["0", "1"]


def test_what_is_prepared_counts_when_it_is_saved_and_is_not_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    records = history(0.1, 0.5)
    save(store, records[:1])
    parameters, state = [np.full(3, 2.0)], {"m_t/0": np.array([2.0])}
    store.prepare(2, parameters, state)
    before = CheckpointStore(tmp_path).load()
    assert before is not None
    assert before.history == tuple(records[:1])
    files = {path: path.stat().st_ino for path in tmp_path.glob("*-2.npz")}
    assert len(files) == 2
    store.save(parameters, state, records)
    assert {path: path.stat().st_ino for path in files} == files
    after = CheckpointStore(tmp_path).load()
    assert after is not None
    assert after.history == tuple(records)
    np.testing.assert_array_equal(after.parameters[0], [2, 2, 2])
    np.testing.assert_array_equal(after.strategy_state["m_t/0"], [2])


def test_other_parameters_than_the_prepared_ones_are_written(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.prepare(1, [np.zeros(3)], {})
    save(store, history(0.1))
    found = store.load()
    assert found is not None
    np.testing.assert_array_equal(found.parameters[0], [1, 1, 1])


def test_torn_lines_and_rounds_that_were_not_finished_do_not_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    records = history(0.1, 0.5)
    save(store, records[:1])
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"number": 2, "accur')  # killed while writing round 2
    save(store, records)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(Round(number=3, accuracy=0.9).model_dump_json() + "\n")  # killed before state.json
    found = store.load()
    assert found is not None
    assert found.history == tuple(records)


def test_a_kill_at_any_moment_leaves_the_last_or_the_round_before(tmp_path: Path) -> None:
    program = """
import sys, numpy as np
from pathlib import Path
from flops.core.project import Round
from flops.trainer.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]))
done = store.load()
history = list(done.history) if done else []
while True:
    number = len(history) + 1
    history.append(Round(number=number, accuracy=1 / number))
    parameters, state = [np.full(20_000, float(number))], {"m/0": np.full(20_000, float(number))}
    if number % 2:
        store.prepare(number, parameters, state)
    store.save(parameters, state, history)
    print(number, flush=True)
"""
    told = 0
    for attempt in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            told = int(line)
            if told >= (attempt + 1) * 10:
                break
        time.sleep(0.001 * attempt)  # another moment each time
        process.kill()
        told = max([told, *(int(line) for line in process.stdout)])
        process.wait()
        process.stdout.close()
        found = CheckpointStore(tmp_path).load()
        assert found is not None
        last = found.history[-1].number
        assert told <= last <= told + 1
        assert [record.number for record in found.history] == list(range(1, last + 1))
        assert (found.parameters[0] == last).all()
        assert (found.strategy_state["m/0"] == last).all()
        with np.load(CheckpointStore(tmp_path).parameters_file(1)) as best:
            assert (best["0"] == 1).all()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    (tmp_path / "round-1.tmp").symlink_to("/dev/full")
    parameters = [np.ones(3)]
    store.prepare(1, parameters, {})
    (tmp_path / "round-1.tmp").symlink_to("/dev/full")  # a failed write removes it
    with pytest.raises(FlopsError) as caught:
        store.save(parameters, {}, history(0.1))
    assert caught.value.code is ErrorCode.DISK_FULL
    assert store.load() is None
