"""``NodeEngine``: makes this machine a node of a cluster."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flops.cli.node_config import config, load_configuration, paths_of
from flops.cli.node_join import Joining, keep_cluster
from flops.cli.output import FormatOption, OutputFormat, print_data, print_line, run_app, say
from flops.errors import CATALOGUE, ErrorCode, FlopsError

app = typer.Typer(
    name="NodeEngine",
    help="Make this machine a node of a FLOps cluster. Without a subcommand, start the NodeEngine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config, name="config")

STARTED = "NodeEngine started  🟢"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    arguments = _home_first(list(sys.argv[1:] if argv is None else argv))
    return run_app(app, arguments, prog_name="NodeEngine", log_folder=Path.home() / ".cache" / "flops")


def _home_first(arguments: list[str]) -> list[str]:
    """``--home DIR`` may stand anywhere; it belongs to the whole command."""
    for index, argument in enumerate(arguments):
        if argument == "--home" and index + 1 < len(arguments):
            return [argument, arguments[index + 1], *arguments[:index], *arguments[index + 2 :]]
        if argument.startswith("--home="):
            return [argument, *arguments[:index], *arguments[index + 1 :]]
    return arguments


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    address: Annotated[
        str | None, typer.Option("-a", "--clusterAddr", help="Address of the cluster; kept for later starts.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("-p", "--clusterPort", help="Port of the cluster; kept likewise [10100].")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Join by what `flops node invite` printed.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Do without encryption, also to another machine; kept likewise."),
    ] = False,
    is_detached: Annotated[
        bool, typer.Option("-d", "--detach", "--detatch", help="Run in the background.")
    ] = False,
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder of this node's state and configuration.")
    ] = None,
) -> None:
    """Make this machine a node of a FLOps cluster. Without a subcommand, start the NodeEngine."""
    context.obj = None if home is None else home.expanduser().absolute()  # the daemon runs elsewhere
    if context.invoked_subcommand is not None:
        if is_detached or insecure or any(given is not None for given in (address, port, token)):
            raise FlopsError(
                ErrorCode.USAGE,
                "-a, -p, -d, --token and --insecure start the NodeEngine; "
                f"they do not go with {context.invoked_subcommand!r}.",
            )
        return
    if token is not None and insecure:
        raise FlopsError(ErrorCode.USAGE, "--token encrypts, --insecure does not: give one of them.")
    joining = Joining(address, port, token, is_insecure=insecure)
    _start(context, joining, is_detached=is_detached)


def _start(context: typer.Context, joining: Joining, *, is_detached: bool) -> None:
    from flops.cli.node_process import is_run_by_systemd, start_daemon
    from flops.node.home import already_running, running_pid

    paths = paths_of(context)
    if running_pid(paths.pid) is not None:
        raise already_running(paths.pid)
    keep_cluster(paths, joining)
    if is_detached or is_run_by_systemd(paths):
        start_daemon(paths, context.obj)
        print_line(STARTED)
        _tell_join(context)
    if not is_detached:
        _stay(context)


def _tell_join(context: typer.Context) -> None:
    from flops.cli.node_process import wait_for_join

    report = wait_for_join(paths_of(context))
    if report is not None and report.is_connected:
        say(f"Joined the cluster at {report.cluster_address} as {report.name}.")
    elif report is not None:
        say(f"Not joined yet: {report.link_detail} NodeEngine keeps trying; `NodeEngine status` shows it.")


def _stay(context: typer.Context) -> None:
    """Stay in the foreground until Ctrl+C, which stops the NodeEngine."""
    from flops.cli.node_process import follow_log, is_run_by_systemd, stop_daemon
    from flops.wiring.node import run_node_daemon

    paths = paths_of(context)
    if is_run_by_systemd(paths):
        with contextlib.suppress(KeyboardInterrupt):
            follow_log(paths.log, print_line)
        say("Exiting...")
        stop_daemon(paths)
        return
    print_line(STARTED)
    home: Path | None = context.obj
    code = run_node_daemon(["--foreground", *([] if home is None else ["--home", str(home)])])
    if code != 0:
        raise typer.Exit(code)
    say("Exiting...")


@app.command()
def status(context: typer.Context, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show whether the NodeEngine runs and is connected, its addons, services and data."""
    from flops.cli.node_config import pending_changes
    from flops.cli.node_process import running_report
    from flops.cli.node_status import show_status, status_data
    from flops.node.home import running_pid

    paths = paths_of(context)
    conf = load_configuration(paths)
    pid = running_pid(paths.pid)
    report = running_report(paths)
    data = status_data(paths, conf, report, pid)
    print_data(data, output_format, lambda: show_status(paths, conf, report, pid))
    for sentence in pending_changes(paths, conf):
        say(sentence)
    if pid is None:
        raise typer.Exit(CATALOGUE[ErrorCode.NOT_RUNNING].exit_code)


@app.command()
def doctor(context: typer.Context, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Check this node, its machine and its way to the cluster, and say what to do about each finding."""
    from flops.cli.examination import run_checks, tell_findings
    from flops.cli.node_doctor import node_checks

    tell_findings(run_checks(node_checks(paths_of(context))), output_format)


@app.command()
def stop(context: typer.Context) -> None:
    """Stop the NodeEngine with its addons and the services that run on this node."""
    from flops.cli.node_process import stop_daemon
    from flops.wiring.node_files import end_node_leftovers

    paths = paths_of(context)
    if stop_daemon(paths):
        print_line("NodeEngine stopped; its addons and services have ended.")
        return
    ended = end_node_leftovers(paths)
    print_line("NodeEngine is not running.")
    if ended:
        say(f"It had been killed: {ended} of its services and addons still ran, and have been ended.")


@app.command()
def logs(context: typer.Context) -> None:
    """Show what the NodeEngine logs from now on; Ctrl+C ends this, not the NodeEngine."""
    from flops.cli.node_process import follow_log

    try:
        follow_log(paths_of(context).log, print_line)
    except KeyboardInterrupt:
        say("Detatching...")


@app.command()
def version() -> None:
    """Show the version."""
    from flops import __version__

    print_line(__version__)


@app.command()
def install(
    context: typer.Context,
    unit: Annotated[
        Path | None, typer.Option("--unit", help="Write the unit there instead, and do not load it.")
    ] = None,
) -> None:
    """Have systemd run the NodeEngine: write nodeengine.service, checked, and load it."""
    from flops.cli.node_unit import install_unit

    say(install_unit(paths_of(context), unit))
