"""``flops``: the control plane, projects, data, nodes and models from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

import flops
from flops.cli.cluster_commands import mock_data, model, node, tracking
from flops.cli.connection import connected
from flops.cli.data_commands import data
from flops.cli.output import FormatOption, OutputFormat, print_data, print_facts, print_line, run_app, say
from flops.cli.project_commands import project

app = typer.Typer(
    name="flops",
    help="Federated learning operations: train on data that never leaves the machines that collected it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(project, name="project")
app.add_typer(project, name="p", hidden=True)
app.add_typer(mock_data, name="mock-data")
app.add_typer(node, name="node")
app.add_typer(data, name="data")
app.add_typer(model, name="model")
app.command("tracking")(tracking)

Home = Annotated[Path | None, typer.Option("--home", help="Folder of all state [FLOPS_HOME].")]
Port = Annotated[int | None, typer.Option(min=0, max=65_535)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_app(app, arguments, prog_name="flops", log_folder=Path.home() / ".cache" / "flops")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Federated learning operations: train on data that never leaves the machines that collected it."""
    if version:
        print_line(flops.__version__)
        raise typer.Exit


@app.command()
def up(
    home: Home = None,
    manager_port: Port = None,
    cluster_port: Port = None,
    tracking_port: Port = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; Ctrl+C stops it.")] = False,
) -> None:
    """Start the control plane: manager, cluster orchestrator and MLflow server."""
    from flops.cli.control import start_control_plane
    from flops.settings import ControlSettings

    given = {
        "home": home,
        "manager_port": manager_port,
        "cluster_port": cluster_port,
        "tracking_port": tracking_port,
    }
    settings = ControlSettings.read(None, **given)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    if foreground:
        from flops.wiring import main as run_process

        raise typer.Exit(run_process(["control-plane", *options]))
    endpoint = start_control_plane(settings.control_dir, options)
    say("The control plane is up.")
    print_facts(
        [
            ("Manager", endpoint["manager_url"]),
            ("API docs", f"{endpoint['manager_url']}/docs"),
            ("Cluster", f"{endpoint['cluster_address']}  (NodeEngine -a ADDRESS -p PORT -d)"),
            ("MLflow", f"{endpoint['tracking_url']}  (ready in a few seconds)"),
            ("Admin token", settings.control_dir / "admin.token"),
        ]
    )


@app.command()
def down(home: Home = None) -> None:
    """Stop the control plane. Nodes go on, and join again when it is back."""
    from flops.cli.control import stop_control_plane
    from flops.settings import ClientSettings

    stop_control_plane(ClientSettings.read(home=home).control_dir)
    say("The control plane is down. Its state stays; `flops up` goes on from there.")


@app.command()
def status(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show the state of the control plane."""
    from flops.wire.rest import ControlStatus

    with connected() as api:
        answer = api.get("/status", ControlStatus)

    def show() -> None:
        tracking_state = "ready" if answer.is_tracking_ready else answer.tracking_detail
        since = datetime.fromtimestamp(answer.started_at_s, UTC).astimezone()
        print_facts(
            [
                ("Manager", f"{answer.manager_url}, running since {since:%Y-%m-%d %H:%M:%S}"),
                ("API docs", f"{answer.manager_url}/docs"),
                ("Cluster", answer.cluster_address),
                ("MLflow", f"{answer.tracking_url}, {tracking_state}"),
                ("Nodes", f"{answer.nodes_connected} of {answer.nodes_total} connected"),
                ("Projects", f"{answer.projects_active} of {answer.projects_total} active"),
                ("State", answer.home),
                ("Version", answer.version),
            ]
        )

    print_data(answer, output_format, show)


@app.command("reset-database")
def reset_database(
    force: Annotated[bool, typer.Option("--force", help="Stop projects that still run.")] = False,
) -> None:
    """Forget all projects, their history and known environments."""
    from flops.wire.rest import Message

    with connected() as api:
        query = {"force": "true"} if force else {}
        say(api.delete("/database", Message, params=query).message)


@app.command("clear-registry")
def clear_registry() -> None:
    """Forget the environments that are known, so that the next project builds anew."""
    from flops.wire.rest import Message

    with connected() as api:
        say(api.delete("/registry", Message).message)


@app.command("version")
def version_command() -> None:
    """Print the version."""
    print_line(flops.__version__)
