"""The main job on real data: two prepared nodes, devices' data, a plain ML repository, a served model.

It only types what its users type (every command is printed before it runs), and reads what they read. State
lives in `.demo/`. A second run finds the first one's control plane and nodes, and uses them. With
`--packaging image` all services run in containers, from images; the state is in `.demo-image/` then.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil

from flops.adapters.containers.detection import engine_socket
from flops.adapters.containers.engine import ContainerEngine, EngineRefusedError
from flops.errors import FlopsError
from flops.testing.podman import Podman, missing_for_podman

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
NODES = ("node-1", "node-2")


class Demo:
    """The steps of the demo, in the order in which users take them."""

    def __init__(self, home: Path, packaging: str) -> None:
        self.home = home
        self.packaging = packaging
        self.started = time.monotonic()
        self.timings: list[tuple[str, float]] = []
        self.env = {**os.environ, "FLOPS_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def type(self, *command: str, show: bool = True, check: bool = True) -> str:
        """Run a command as a user would; returns what it prints."""
        if show:
            print(f"\n$ {shlex.join(self._short(part) for part in command)}", flush=True)
        result = subprocess.run(command, env=self.env, text=True, stdout=subprocess.PIPE, check=False)
        if show and result.stdout:
            print(result.stdout.rstrip(), flush=True)
        if check and result.returncode != 0:
            print(f"\nThe demo stops here: the command above ended with exit code {result.returncode}.")
            print(f"Logs: {self._short(str(self.home))}. To stop what runs: make demo-stop")
            raise SystemExit(result.returncode)
        return result.stdout

    def ask(self, *command: str) -> object:
        """Run a command with ``--format json`` quietly; returns its data."""
        return json.loads(self.type(*command, "--format", "json", show=False))["data"]

    def stage(self, title: str) -> Stage:
        """Print a heading; the time until the next one is the stage's."""
        return Stage(self, title)

    def _short(self, text: str) -> str:
        return text.replace(f"{ROOT}/", "")

    # --- the steps ---

    def find_engine(self) -> None:
        with self.stage("Find a container engine"):
            socket = engine_socket(None, os.environ)
            if not answers(socket):
                missing = missing_for_podman()
                if missing:
                    print(f"There is none, and none can be started: it {missing}.")
                    raise SystemExit(1)
                podman = Podman(self.engine_folder)
                socket = podman.socket
                if not answers(socket):
                    podman.start()
                    print("There was none: Podman was started for the demo.")
            print(f"Its socket is {self._short(str(socket))}.")
            self.env["FLOPS_CONTAINER_SOCKET"] = str(socket)

    @property
    def engine_folder(self) -> Path:
        """Of the engine that the demo starts if there is none."""
        folder = self.home / "engine"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start_control_plane(self) -> None:
        with self.stage("Start the control plane: manager, cluster orchestrator, MLflow"):
            if self.is_up():
                print("It is running already.")
            else:
                self.type("flops", "up")

    def is_up(self) -> bool:
        status = subprocess.run(["flops", "status"], env=self.env, capture_output=True, check=False)
        return status.returncode == 0

    def prepare_nodes(self) -> None:
        with self.stage("Prepare two worker nodes as learners, as their operators would"):
            address = self.ask("flops", "status")["cluster_address"]
            host, port = address.rsplit(":", 1)
            for number, name in enumerate(NODES):
                node = ["NodeEngine", "--home", str(self.home / name)]
                status = subprocess.run([*node, "status"], env=self.env, capture_output=True, check=False)
                if status.returncode == 0:
                    print(f"{name} is running already.")
                    continue
                self.type(*node, "-a", host, "-p", port, "-d")
                self.type(*node, "config", "addon", "FLOps-learner", "on")
                if number == 0:
                    self.type(*node, "config", "addon", "imageBuilder", "on")
                if self.packaging == "image":
                    self.type(*node, "config", "virtualization", "container", "on")
                self.type(*node, "stop")
                self.type(*node, "-a", host, "-p", port, "-d")
                self.type(*node, "config", "addon")
            self.wait_for("both nodes to be ready", self.ready_nodes, len(NODES))
            self.type("flops", "node", "list")

    def ready_nodes(self) -> int:
        nodes = self.ask("flops", "node", "list")
        return sum(
            1
            for node in nodes
            if node["is_connected"]
            and node["addons"]
            and all(a["state"] == "healthy" for a in node["addons"])
        )

    def wait_for(self, what: str, measure, wanted: int) -> None:
        deadline = time.monotonic() + 60
        while measure() < wanted:
            if time.monotonic() > deadline:
                print(f"Gave up waiting for {what}.")
                raise SystemExit(1)
            time.sleep(0.2)

    def send_data(self) -> None:
        with self.stage("Send 9,000 handwritten digits to the nodes, as devices would"):
            if self.rows() > 0:
                print("The nodes hold the digits already.")
                return
            self.type(
                "flops", "mock-data", "create", str(ROOT / "examples/slas/mocks/mnist_multi.json"), "--watch"
            )
            self.wait_for("the nodes to report the digits", self.rows, 9_000)
            self.type("flops", "node", "list")

    def rows(self) -> int:
        nodes = self.ask("flops", "node", "list")
        return sum(tag["rows"] for node in nodes for tag in node["data_tags"] if tag["name"] == "mnist")

    def make_repository(self) -> Path:
        with self.stage("Make a Git repository of ordinary training code from examples/mnist_sklearn"):
            repository = self.home / "repositories" / "mnist_sklearn"
            if (repository / ".git").exists():
                print("It is there already.")
                return repository
            shutil.copytree(
                ROOT / "examples" / "mnist_sklearn", repository, ignore=shutil.ignore_patterns("__pycache__")
            )
            author = ["-c", "user.name=An ML engineer", "-c", "user.email=engineer@example.org"]
            self.type("git", "init", "--quiet", "--initial-branch", "main", str(repository))
            self.type("git", "-C", str(repository), "add", ".")
            self.type("git", "-C", str(repository), *author, "commit", "--quiet", "--message", "Train digits")
            return repository

    def train(self, repository: Path) -> str:
        with self.stage("Submit the project: federate, build, place, train, serve"):
            sla = json.loads((ROOT / "examples/slas/projects/mnist_sklearn_small.json").read_text())
            sla["ml_repo_url"] = repository.as_uri()
            sla["packaging"] = self.packaging
            path = self.home / "mnist_sklearn_small.json"
            path.write_text(json.dumps(sla, indent=2) + "\n")
            output = self.type("flops", "project", "create", str(path), "--watch")
            return output.split()[0]

    def predict(self, project_id: str) -> float:
        with self.stage("Send digits the training never saw to the served model"):
            unseen = self.home / "unseen.npz"
            self.type(str(BIN / "python"), str(ROOT / "scripts" / "unseen_digits.py"), str(unseen))
            self.type("flops", "model", "predict", project_id, str(unseen), "--limit", "10")
            data = self.ask("flops", "model", "predict", project_id, str(unseen))
            pairs = [(row["prediction"], row["label"]) for row in data["rows"]]
            accuracy = sum(1 for prediction, label in pairs if prediction == label) / len(pairs)
            print(f"\nAccuracy on {len(pairs):,} digits the training never saw: {accuracy:.3f}")
            return accuracy

    def summarise(self, project_id: str, accuracy: float) -> None:
        project = self.ask("flops", "project", "show", project_id)["project"]
        status = self.ask("flops", "status")
        print("\n── What is there now")
        print(f"  MLflow GUI      {project['tracking_url']}")
        print(f"  Inference       {project['inference_url']}/invocations")
        print(f"  API docs        {status['manager_url']}/docs")
        print("\n── How long it took")
        for title, seconds in self.timings:
            print(f"  {seconds:6.1f} s  {title}")
        spans = project["spans"]
        for span, following in pairwise(spans):
            seconds = following["entered_at_s"] - span["entered_at_s"]
            print(f"           project {span['stage']:<11} {seconds:6.2f} s")
        print(f"  {time.monotonic() - self.started:6.1f} s  in all")
        print("\n── What next")
        home = self._short(str(self.home))
        print(
            f"  Look around:  export FLOPS_HOME={home} PATH=.venv/bin:$PATH; flops project show {project_id}"
        )
        option = " PACKAGING=image" if self.packaging == "image" else ""
        print(f"  Again:        make demo{option}        (the same nodes, data and environment)")
        print(
            f"  Stop all:     make demo-stop{option}   (state stays in {home}; remove it with rm -rf {home})"
        )
        if accuracy < 0.80:
            print(f"\nThe accuracy {accuracy:.3f} is below 0.80: something is wrong.")
            raise SystemExit(1)

    def stop(self) -> None:
        for name in NODES:
            self.type("NodeEngine", "--home", str(self.home / name), "stop", check=False)
        self.type("flops", "down", check=False)
        if self.packaging == "image":
            self._stop_engine()

    def _stop_engine(self) -> None:
        """End the engine that the demo has started, if it has; its images come from the nodes again."""
        for process in psutil.process_iter(["cmdline"]):
            if f"unix://{self.engine_folder}/podman.sock" in (process.info["cmdline"] or ()):
                process.kill()
        if (self.engine_folder / "containers.conf").exists():
            Podman(self.engine_folder).close()

    def run(self) -> None:
        if self.packaging == "image":
            self.find_engine()
        self.start_control_plane()
        self.prepare_nodes()
        self.send_data()
        project_id = self.train(self.make_repository())
        self.summarise(project_id, self.predict(project_id))


def answers(socket: Path) -> bool:
    """Whether a container engine listens there."""
    try:
        ContainerEngine(socket).facts()
    except (FlopsError, EngineRefusedError):
        return False
    return True


class Stage:
    """One timed stage of the demo."""

    def __init__(self, demo: Demo, title: str) -> None:
        self.demo = demo
        self.title = title

    def __enter__(self) -> None:
        print(f"\n── {self.title}", flush=True)
        self.begun = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.demo.timings.append((self.title, time.monotonic() - self.begun))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="folder of all state; .demo, or .demo-image for images")
    parser.add_argument(
        "--packaging",
        choices=("environment", "image"),
        default="environment",
        help="what the project runs from",
    )
    parser.add_argument("--stop", action="store_true", help="stop what an earlier demo left running")
    parser.add_argument("--stop-after", action="store_true", help="stop everything at the end")
    arguments = parser.parse_args()
    name = ".demo-image" if arguments.packaging == "image" else ".demo"
    demo = Demo((arguments.home or ROOT / name).resolve(), arguments.packaging)
    if arguments.stop:
        demo.stop()
        return
    try:
        demo.run()
    finally:
        if arguments.stop_after:
            demo.stop()


if __name__ == "__main__":
    sys.exit(main())
