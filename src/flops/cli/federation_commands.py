"""``flops cluster``: the further clusters of a federation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from flops.cli.cluster_commands import seconds_of
from flops.cli.connection import connected, global_options
from flops.cli.output import FormatOption, OutputFormat, print_data, print_facts, print_line, print_table, say

if TYPE_CHECKING:
    from flops.cli.own_process import OwnProcess
    from flops.settings import RelaySettings

cluster = typer.Typer(help="Further clusters, each at a site of its own.", no_args_is_help=True)

Home = Annotated[Path | None, typer.Option("--home", help="Folder of all state [FLOPS_HOME].")]


@cluster.command("list")
def list_clusters(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the clusters, connected or not, with their nodes, addons and data tags."""
    from flops.wire.rest import ClusterList

    with connected() as api:
        clusters = api.get("/clusters", ClusterList).clusters

    def show() -> None:
        rows = [
            (
                c.name,
                "connected" if c.is_connected else "gone",
                c.address,
                f"{c.nodes_connected} of {c.nodes}",
                ", ".join(f"{name} ({count})" for name, count in c.addons.items()),
                ", ".join(f"{name} ({rows:,} rows)" for name, rows in c.data_tags.items()),
            )
            for c in clusters
        ]
        print_table(["cluster", "state", "address", "nodes", "addons", "data tags"], rows, empty="")

    print_data(clusters, output_format, show)


@cluster.command("invite")
def invite_cluster(
    name: Annotated[str, typer.Argument(help="Name that the cluster will have, such as edge-a.")],
    duration: Annotated[str, typer.Option("--for", help="How long: 30m, 1h, 7d.")] = "1h",
    address: Annotated[
        str | None,
        typer.Option("--address", help="Where it reaches this cluster, when it is not as it listens."),
    ] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Make a token by which a further cluster joins; it is shown once."""
    from flops.wire.rest import ClusterInvitationMade

    body: dict[str, Any] = {"for_s": seconds_of(duration), "address": address}
    with connected() as api:
        made = api.post(f"/clusters/{quote(name, safe='')}/invitation", ClusterInvitationMade, body)

    def show() -> None:
        print_line(made.token)
        say(f"On a machine of the other site, within {duration}:")
        say(f"flops cluster up --name {made.name} --token TOKEN")

    print_data(made, output_format, show)


@cluster.command("remove")
def remove_cluster(
    name: Annotated[str, typer.Argument(help="Name of the cluster.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also when its nodes have services: they count as failed then.")
    ] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Lock a cluster out at once, with all its nodes, and forget it."""
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.delete(f"/clusters/{quote(name, safe='')}", Message, force="true" if force else None)
    print_data(answer, output_format, lambda: say(answer.message))


@cluster.command("up")
def start_cluster(
    name: Annotated[str | None, typer.Option("--name", help="Name of the cluster; kept.")] = None,
    manager: Annotated[
        str | None,
        typer.Option("--manager", help="HOST:PORT of the manager's cluster [as the token says]; kept."),
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="Join by what `flops cluster invite` printed.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Do without encryption, also to other machines; kept.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(
            "--port", min=0, max=65_535, help="Port that its NodeEngines dial [10100]; 0 takes a free one."
        ),
    ] = None,
    home: Home = None,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay attached; Ctrl+C stops it.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Run a further cluster here: nodes of this site join it, and it joins the manager."""
    from flops.cli.relay_join import RelayJoining, keep_relay
    from flops.settings import RelaySettings, arguments_of

    folder = home or global_options().home
    given = {"home": None if folder is None else folder.absolute(), "cluster_port": port}
    settings = RelaySettings.read(None, **given)
    process = _process(settings)
    process.prepare()
    keep_relay(settings.relay_dir, RelayJoining(name, manager, token, is_insecure=insecure))
    options = arguments_of(given)

    def tell(endpoint: Mapping[str, Any]) -> None:
        say(f"The cluster {endpoint['cluster']} is up.")
        print_data(dict(endpoint), output_format, lambda: _show(endpoint))
        if endpoint["problem"]:
            say(f"Not connected yet: {endpoint['problem']} It keeps trying.")

    if foreground:
        process.run_in_foreground(options, tell)
        say("The cluster has ended.")
        return
    tell(process.start(options))


def _show(endpoint: Mapping[str, Any]) -> None:
    invite = f"flops node invite --cluster {endpoint['cluster']}"
    host, _, port = str(endpoint["cluster_address"]).rpartition(":")
    joining = f"`{invite}` there" if endpoint["is_encrypted"] else f"NodeEngine -a {host} -p {port} -d"
    print_facts(
        [
            ("Cluster", f"{endpoint['cluster']} at {endpoint['cluster_address']}"),
            ("Manager", endpoint["manager"]),
            ("Nodes join by", joining),
        ]
    )


@cluster.command("down")
def stop_cluster(home: Home = None, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Stop the cluster that runs here. Its nodes go on, and join again when it is back."""
    from flops.settings import RelaySettings

    process = _process(RelaySettings.read(None, home=home or global_options().home))
    ended = process.stop()
    if ended is None:
        raise process.not_running()
    data = {"pid": ended.pid, "ran_s": round(ended.ran_s, 1), **ended.endpoint}
    print_data(data, output_format, lambda: say("The cluster is down. Its nodes and their services go on."))


def _process(settings: RelaySettings) -> OwnProcess:
    from flops.cli.own_process import OwnProcess
    from flops.relay.configuration import LOG_FILE, WHAT

    return OwnProcess(
        name="relay",
        what=WHAT,
        folder=settings.relay_dir,
        log=LOG_FILE,
        shown_as="cluster_address",
        command="flops cluster",
    )
