"""``flops``: the control plane, projects, data, nodes and models from the command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import flops
from flops.cli.cluster_commands import mock_data, node, tracking
from flops.cli.connect import connect, connection_line, disconnect
from flops.cli.connection import GlobalOptions, client_settings, connected, global_options
from flops.cli.data_commands import data
from flops.cli.doctor import doctor
from flops.cli.federation_commands import cluster
from flops.cli.image_commands import image
from flops.cli.model_commands import model
from flops.cli.output import (
    FormatOption,
    OutputFormat,
    print_data,
    print_facts,
    print_line,
    run_app,
    say,
    timestamp,
)
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
app.add_typer(mock_data, name="mock_data", hidden=True)
app.add_typer(mock_data, name="m", hidden=True)
app.add_typer(cluster, name="cluster")
app.add_typer(node, name="node")
app.add_typer(data, name="data")
app.add_typer(model, name="model")
app.add_typer(image, name="image")

Home = Annotated[Path | None, typer.Option("--home", help="Folder of all state [FLOPS_HOME].")]
_ADDRESSES = ("manager_url", "cluster_address", "tracking_url")


def _port(what: str, default: int) -> Any:
    return typer.Option(min=0, max=65_535, help=f"Port of {what} [{default}]; 0 takes a free one.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_app(app, arguments, prog_name="flops", log_folder=Path.home() / ".cache" / "flops")


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    home: Home = None,
    url: Annotated[
        str | None, typer.Option("--url", help="Base URL of the manager, when it is elsewhere [FLOPS_URL].")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with its admin token [FLOPS_TOKEN_FILE].")
    ] = None,
    authority_file: Annotated[
        Path | None,
        typer.Option(
            "--authority-file", help="Certificate of the authority it is known by [FLOPS_AUTHORITY_FILE]."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without encryption, also to another machine.")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Federated learning operations: train on data that never leaves the machines that collected it."""
    context.obj = GlobalOptions(home, url, token_file, authority_file, insecure or None)
    if version:
        print_line(flops.__version__)
        raise typer.Exit


@app.command()
def up(
    home: Home = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, for users and nodes on other machines.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without encryption and tokens of nodes, at any address.")
    ] = False,
    manager_port: Annotated[int | None, _port("the REST API", 5072)] = None,
    cluster_port: Annotated[int | None, _port("the cluster, which NodeEngines dial", 10_100)] = None,
    tracking_port: Annotated[int | None, _port("the MLflow server", 7027)] = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; Ctrl+C stops it.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Start the control plane: manager, cluster orchestrator and MLflow server."""
    from flops.cli.control import run_in_foreground, start_control_plane
    from flops.control.lifetime import ADMIN_TOKEN_FILE
    from flops.settings import ControlSettings, arguments_of

    folder = home or global_options().home
    given = {
        "home": None if folder is None else folder.absolute(),
        "host": host,
        "cluster_host": host,
        "encryption": "off" if insecure else None,
        "manager_port": manager_port,
        "cluster_port": cluster_port,
        "tracking_port": tracking_port,
    }
    settings = ControlSettings.read(None, **given)
    options = arguments_of(given)
    token_file = settings.control_dir / ADMIN_TOKEN_FILE

    def tell(endpoint: Mapping[str, Any]) -> None:
        say("The control plane is up.")
        data = {**endpoint, "token_file": token_file}
        print_data(data, output_format, lambda: _show_addresses(endpoint, token_file))

    if foreground:
        run_in_foreground(settings, options, tell)
        say("The control plane has ended.")
        return
    tell(start_control_plane(settings, options))
    say("Prepare nodes with NodeEngine, then submit a project: flops project create SLA --watch")


def _show_addresses(endpoint: Mapping[str, Any], token_file: Path) -> None:
    host, _, port = str(endpoint["cluster_address"]).rpartition(":")
    joining = (
        "flops node invite" if endpoint["is_cluster_encrypted"] else f"NodeEngine -a {host} -p {port} -d"
    )
    print_facts(
        [
            ("Manager", endpoint["manager_url"]),
            ("API docs", f"{endpoint['manager_url']}/docs"),
            ("Cluster", f"{endpoint['cluster_address']}  ({joining})"),
            ("MLflow GUI", f"{endpoint['tracking_url']}  (ready in a few seconds)"),
            ("Authority", endpoint.get("authority_file")),
            ("Admin token", token_file),
        ]
    )


@app.command()
def down(home: Home = None, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Stop the control plane. Nodes go on, and join again when it is back."""
    from flops.cli.control import stop_control_plane

    ended = stop_control_plane(client_settings(home).control_dir)
    data = {"pid": ended.pid, "ran_s": round(ended.ran_s, 1), "killed": ended.killed, **ended.endpoint}

    def tell() -> None:
        addresses = [str(ended.endpoint[key]) for key in _ADDRESSES if key in ended.endpoint]
        say(f"Ended process {ended.pid} after {_duration(ended.ran_s)}: {', '.join(addresses)}.")
        if ended.killed:
            say(f"These processes did not end by themselves and were killed: {_numbers(ended.killed)}.")
        say("The control plane is down. Its state stays; `flops up` goes on from there.")
        say("Nodes and their services go on, and join again then.")

    print_data(data, output_format, tell)


@app.command()
def status(
    home: Home = None,
    is_connecting: Annotated[
        bool, typer.Option("--connect", help="Print the line by which `flops connect` connects elsewhere.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Where the other machine reaches the manager, for --connect.")
    ] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Show the state of the control plane."""
    if is_connecting:
        line = connection_line(home, address)
        print_data({"line": line}, output_format, lambda: print_line(line))
        say("Whoever has this line is the admin. On the other machine: flops connect LINE")
        return
    from flops.control.lifetime import ADMIN_TOKEN_FILE
    from flops.wire.rest import ControlStatus

    with connected(home) as api:
        answer = api.get("/status", ControlStatus)

    def show() -> None:
        tracking_state = "ready" if answer.is_tracking_ready else answer.tracking_detail
        print_facts(
            [
                ("Manager", f"{answer.manager_url}, running since {timestamp(answer.started_at_s)}"),
                ("API docs", f"{answer.manager_url}/docs"),
                ("Cluster", answer.cluster_address),
                ("MLflow GUI", f"{answer.tracking_url}, {tracking_state}"),
                ("Nodes", f"{answer.nodes_connected} of {answer.nodes_total} connected"),
                ("Projects", f"{answer.projects_active} of {answer.projects_total} active"),
                ("State", answer.home),
                ("Authority", answer.authority_file),
                ("Admin token", Path(answer.home) / "control" / ADMIN_TOKEN_FILE),
                ("Version", answer.version),
            ]
        )

    print_data(answer, output_format, show)


app.command("connect")(connect)
app.command("disconnect")(disconnect)
app.command("doctor")(doctor)
app.command("tracking")(tracking)
app.command("t", hidden=True)(tracking)


@app.command("redb", hidden=True)
@app.command("reset-database")
def reset_database(
    force: Annotated[bool, typer.Option("--force", help="Stop what still runs.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Forget all projects, their history and known environments."""
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.delete("/database", Message, force="true" if force else None)
    print_data(answer, output_format, lambda: say(answer.message))


@app.command("clear-registry")
def clear_registry(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Forget the environments that are known, so that the next project builds anew."""
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.delete("/registry", Message)
    print_data(answer, output_format, lambda: say(answer.message))


@app.command("version")
def version_command(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Print the version."""
    print_data({"version": flops.__version__}, output_format, lambda: print_line(flops.__version__))


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3_600:.1f} h"
