"""A stage for trainings in tests: a real data server, and aggregator and learners as real processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flops.actor import EVENTS_FILE, ActorContext, EventLog
from flops.adapters.flight_client import FlightDataClient
from flops.adapters.memory_tracker import MemoryRun, MemoryTracker
from flops.adapters.parquet_store import ParquetStore
from flops.core.ids import ProjectId
from flops.core.project import Round
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.errors import FlopsError
from flops.settings import inherited_environment
from flops.testing.kept_tracker import kept_runs
from flops.trainer.aggregator import Training
from flops.wire.services import AggregatorConfig, LearnerConfig

SOURCES = Path(__file__).resolve().parents[2]
PROJECT, AGGREGATOR, LEARNER_TOKEN, ADMIN_TOKEN = "p1", "aggregator-p1", "learner-secret", "admin-secret"
POLL_S = 0.01

DATA_MANAGER = """
import numpy as np
from flops_utils.ml_repo_building_blocks import load_table
from flops_utils.ml_repo_templates import DataManagerTemplate

class DataManager(DataManagerTemplate):
    def __init__(self):
        self.values = self._prepare_data()

    def _prepare_data(self):
        return load_table().column("value").to_numpy()

    def get_data(self):
        cut = int(0.8 * len(self.values))
        return self.values[:cut], self.values[cut:]
"""

MODEL_MANAGER = '''
import numpy as np
from data_manager import DataManager
from flops_utils.ml_repo_templates import ModelManagerTemplate

class ModelManager(ModelManagerTemplate):
    """Moves a single number half the way to the mean of the data; accuracy falls with the distance."""

    def __init__(self):
        self.center = np.zeros(3, dtype=np.float32)
        self.config = {}

    def set_model_data(self):
        self.training, self.held_out = DataManager().get_data()

    def get_model(self):
        return self

    def get_model_parameters(self):
        return [self.center, np.ones((2, 2))]

    def set_model_parameters(self, parameters):
        self.center, _ = parameters

    def set_training_config(self, config):
        self.config = config

    def fit_model(self):
        self.center += (self.training.mean() - self.center) / 2
        return len(self.training)

    def evaluate_model(self):
        distance = abs(self.held_out.mean() - self.center[0])
        return distance, 1 / (1 + distance), len(self.held_out)
'''

# Stands in for the environment that exports models, which takes seconds: it writes what an export writes.
PLAYED_EXPORT = """#!/bin/sh
set -e
read -r arrays && read -r folder || exit 0
mkdir "$folder.partial"
cp "$arrays" "$folder.partial/"
echo "flavor: played" > "$folder.partial/MLmodel"
mv "$folder.partial" "$folder"
"""


class TrainingStage:
    """One project's data, code, aggregator and learners in a temporary folder. Close it at the end."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tracker = MemoryTracker()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._data_server = DataServer(Catalogue(ParquetStore(root / "data")), ADMIN_TOKEN, "127.0.0.1", 0)
        self.data_address = f"127.0.0.1:{self._data_server.port}"
        export = root / "played-export"
        export.write_text(PLAYED_EXPORT)
        export.chmod(0o755)
        self.model_python = str(export)
        self.push("numbers", pa.table({"value": np.linspace(0.0, 20.0, 101)}))

    def close(self) -> None:
        """End every process and the data server."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        self._data_server.shutdown()

    def push(self, tag: str, table: pa.Table) -> None:
        """Give the node data."""
        with FlightDataClient(self.data_address, ADMIN_TOKEN) as client:
            client.push(table.schema, table.to_batches(), tag)

    def repo(
        self,
        name: str = "repo",
        *,
        model_manager: str = MODEL_MANAGER,
        data_manager: str = DATA_MANAGER,
        changes: Mapping[str, str] | None = None,
    ) -> Path:
        """Write an ML repository; `changes` are replacements in its model manager."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        for old, new in (changes or {}).items():
            assert old in model_manager, f"{old!r} is not in the model manager"
            model_manager = model_manager.replace(old, new)
        (folder / "model_manager.py").write_text(model_manager)
        (folder / "data_manager.py").write_text(data_manager)
        return folder

    # --- the aggregator ---

    def config(self, *, learners: int = 2, **changes: Any) -> AggregatorConfig:
        """A configuration that needs all `learners`."""
        needed = {
            key: learners for key in ("min_available_clients", "min_fit_clients", "min_evaluate_clients")
        }
        return AggregatorConfig.model_validate(
            {
                "project_id": PROJECT,
                "customer_id": "Admin",
                "flavor": "sklearn",
                "rounds": 3,
                "learner_token": LEARNER_TOKEN,
                "tracking_uri": "memory",
                "model_name": "model",
                "round_timeout_s": 20.0,
                **needed,
                **changes,
            }
        )

    def aggregator_context(self, config: AggregatorConfig, repo: Path, **changes: Any) -> ActorContext:
        """The aggregator's context, saved in its work folder."""
        context = self._context(AGGREGATOR, "node-0", repo, config.model_dump(mode="json"), **changes)
        context.save()
        return context

    def cluster_context(self, number: int, *, learners: int = 2, **changes: Any) -> ActorContext:
        """The context of the aggregator of a cluster below the aggregator, saved in its work folder."""
        parent = {"address": self.address(), "token": LEARNER_TOKEN}
        config = self.config(
            learners=learners, **{"parent": parent, "cluster": f"cluster-{number}", **changes}
        )
        service, raw = f"{AGGREGATOR}-{number}", config.model_dump(mode="json")
        context = self._context(service, f"node-of-cluster-{number}", self.root, raw)
        context.save()
        return context

    def start_aggregator(
        self, context: ActorContext, *kill_points: str, is_tracking_played: bool = True
    ) -> subprocess.Popen[bytes]:
        """Start an aggregator as a process: the real one, or one that tracks in a file.

        The latter is killed once at each of the places of `flops.testing.kill_points`.
        """
        program = (
            ["flops.testing.played_aggregator"] if is_tracking_played else ["flops.wiring", "aggregator"]
        )
        context_file = str(Path(context.work_dir) / "context.json")
        return self._start([sys.executable, "-m", *program, context_file, *kill_points], context.service_id)

    def kept_run(self) -> MemoryRun:
        """The run as a played aggregator has tracked it."""
        return kept_runs(self.root / AGGREGATOR / "tracked.json")[ProjectId(PROJECT)]

    def train_in_thread(self, context: ActorContext, *, join_patience_s: float = 20.0) -> TrainingThread:
        """Start an aggregator in a thread of this process, tracking with `self.tracker`."""
        return TrainingThread(context, self.tracker, join_patience_s)

    def address(self, aggregator: str = AGGREGATOR) -> str:
        """Where an aggregator listens; waits for it."""
        return str(self.await_event(aggregator, "listening")["address"])

    # --- the learners ---

    def start_learner(
        self, number: int, repo: Path, *, of: int = 2, node: str | None = None, **changes: Any
    ) -> subprocess.Popen[bytes]:
        """Start a learner as a process; `changes` are of its configuration, `disclosure` of its context."""
        disclosure = changes.pop("disclosure", "full")
        config = LearnerConfig.model_validate(
            {
                "project_id": PROJECT,
                "aggregator": changes.pop("aggregator", None) or self.address(),
                "learner_token": LEARNER_TOKEN,
                "data_tags": ("numbers",),
                "part": number % of,
                "parts": of,
                **changes,
            }
        )
        name = f"learner-{PROJECT}-{number}"
        fields = config.model_dump(mode="json")
        context = self._context(name, node or f"node-{number}", repo, fields, disclosure=disclosure)
        return self._start([sys.executable, "-m", "flops.trainer.learner", str(context.save())], name)

    # --- what happens ---

    def events(self, service: str, kind: str | None = None) -> list[dict[str, Any]]:
        """What a service has told so far."""
        path = self.root / service / EVENTS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind is None or event["kind"] == kind]

    def rounds(self, aggregator: str = AGGREGATOR) -> list[Round]:
        """The rounds that an aggregator has told so far."""
        return [Round.model_validate(e["record"]) for e in self.events(aggregator, "round_completed")]

    def await_event(
        self,
        service: str,
        kind: str,
        matches: Callable[[dict[str, Any]], bool] = lambda _: True,
        *,
        after: int = 0,
        timeout_s: float = 30.0,
    ) -> dict[str, Any]:
        """Wait for an event, looking at those beyond the first `after` ones."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = [e for e in self.events(service)[after:] if e["kind"] == kind and matches(e)]
            return bool(found)

        self.await_condition(is_there, f"{kind} of {service}", timeout_s=timeout_s)
        return found[0]

    def await_condition(
        self, is_met: Callable[[], bool], what: str = "the condition", *, timeout_s: float = 30.0
    ) -> None:
        """Poll until something is so."""
        deadline = time.monotonic() + timeout_s
        while not is_met():
            assert time.monotonic() < deadline, f"gave up waiting for {what}\n{self.output()}"
            time.sleep(POLL_S)

    def output(self) -> str:
        """The ends of all outputs and event logs, for failures."""
        files = sorted(self.root.glob("*/output.log")) + sorted(self.root.glob(f"*/{EVENTS_FILE}"))
        return "\n".join(f"--- {path.relative_to(self.root)}\n{path.read_text()[-3000:]}" for path in files)

    def _context(
        self, service: str, node: str, repo: Path, config: dict[str, Any], **changes: Any
    ) -> ActorContext:
        work_dir = self.root / service
        work_dir.mkdir(exist_ok=True)
        fields: dict[str, Any] = {
            "repo_dir": str(repo),
            "kit_dir": str(SOURCES),
            "project_python": sys.executable,
            "model_python": self.model_python,
            "data_address": self.data_address,
            "data_token": ADMIN_TOKEN,
            **changes,
        }
        return ActorContext(
            service_id=service,
            project_id=PROJECT,
            node_name=node,
            work_dir=str(work_dir),
            config=config,
            **fields,
        )

    def _start(self, argv: list[str], service: str) -> subprocess.Popen[bytes]:
        env = {
            **inherited_environment(),
            "PYTHONPATH": str(SOURCES),
            "OMP_NUM_THREADS": "1",
            "http_proxy": "http://127.0.0.1:9",  # nothing of ours goes through the environment's proxies
            "no_proxy": "",
        }
        with (self.root / service / "output.log").open("ab") as output:
            process = subprocess.Popen(argv, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        self.processes.append(process)
        return process


class TrainingThread:
    """An aggregator in a thread."""

    def __init__(self, context: ActorContext, tracker: MemoryTracker, join_patience_s: float) -> None:
        self.error: Exception | None = None
        config = AggregatorConfig.model_validate(context.config)
        environ = inherited_environment()
        events = EventLog(Path(context.work_dir))
        self.training = Training(
            context, config, events, lambda _: tracker, environ, join_patience_s=join_patience_s
        )
        self._thread = threading.Thread(target=self._run, name="training")
        self._thread.start()

    def result(self, timeout_s: float = 40.0) -> None:
        """Wait for its end; raises what it failed with."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the training has not ended"
        if self.error is not None:
            raise self.error

    def failure(self, timeout_s: float = 40.0) -> FlopsError:
        """Wait for its end; returns what it failed with."""
        try:
            self.result(timeout_s)
        except FlopsError as exc:
            return exc
        raise AssertionError("the training did not fail")

    def _run(self) -> None:
        try:
            self.training.run()
        except Exception as exc:  # noqa: BLE001 (raised again by `result`)
            self.error = exc
        finally:
            self.training.close()
