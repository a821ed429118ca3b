"""``flops node``, ``mock-data`` and ``tracking``."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from flops.cli.connection import connected, read_sla
from flops.cli.findings import health_line, show_one_node
from flops.cli.output import FormatOption, OutputFormat, print_data, print_line, print_table, say
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.core.project import MockData

node = typer.Typer(help="Nodes of the cluster.", no_args_is_help=True)
mock_data = typer.Typer(help="Mock data providers stand in for devices.", no_args_is_help=True)

DATASET_SUFFIXES = frozenset({".parquet", ".csv", ".tsv", ".npz", ".arrow"})
_POLL_S = 0.3
_ANNOUNCED_WITHIN_S = 20.0  # nodes look for new rows every few seconds


@node.command("list")
def list_nodes(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the nodes with their health, addons and data tags."""
    from flops.wire.rest import NodeList

    with connected() as api:
        nodes = api.get("/nodes", NodeList).nodes

    def show() -> None:
        rows = [
            (
                n.name,
                n.cluster,
                "connected" if n.is_connected else "gone",
                health_line(n.health),
                ", ".join(f"{a.name} ({a.state})" for a in n.addons),
                ", ".join(f"{t.name} ({t.rows:,} rows)" for t in n.data_tags),
                f"{n.facts.architecture}, {n.facts.cpu_cores} cores, {n.facts.memory_mb:,} MB",
            )
            for n in nodes
        ]
        print_table(
            ["node", "cluster", "state", "health", "addons", "data tags", "machine"],
            rows,
            empty="No node has joined yet.",
        )

    print_data(nodes, output_format, show)


@node.command("show")
def show_node(
    name: Annotated[str, typer.Argument(help="Name or id of the node.")],
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Show a node: its machine, addons and data, and what is wrong with it."""
    from flops.core.cluster import find_node
    from flops.wire.rest import NodeList

    with connected() as api:
        found = find_node(api.get("/nodes", NodeList).nodes, name)
    print_data(found, output_format, lambda: show_one_node(found))


@node.command("invite")
def invite_node(
    nodes: Annotated[int, typer.Option("--nodes", help="How many nodes may join by the token.")] = 1,
    duration: Annotated[str, typer.Option("--for", help="How long: 30m, 1h, 7d.")] = "1h",
    addons: Annotated[
        str | None, typer.Option("--addons", help="What they may switch on, with commas between [all].")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="Where they reach the cluster, when it is not as it listens."),
    ] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="Which cluster they join [the manager's own].")
    ] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Make a token by which nodes on other machines join; it is shown once."""
    from flops.node.configuration import find_addon
    from flops.wire.rest import InvitationMade

    body: dict[str, Any] = {"nodes": nodes, "for_s": seconds_of(duration), "address": address}
    if cluster is not None:
        body["cluster"] = cluster
    if addons is not None:
        body["addons"] = [find_addon(name) for name in addons.split(",") if name.strip()]
    with connected() as api:
        made = api.post("/invitations", InvitationMade, body)

    def show() -> None:
        print_line(made.token)
        say(f"On {'the new machine' if nodes == 1 else f'each of {nodes} machines'}, within {duration}:")
        say("sudo NodeEngine --token TOKEN -d")

    print_data(made, output_format, show)


def seconds_of(text: str) -> float:
    """Read a duration such as 30m, 1h or 7d.

    Raises:
        FlopsError: ``usage``.
    """
    found = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if found is None or not int(found[1]):
        raise FlopsError(
            ErrorCode.USAGE, f"{text!r} is no duration.", hint="Say it as 90s, 30m, 1h or 7d; at most 366d."
        )
    return int(found[1]) * {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}[found[2]]


@node.command("remove")
def remove_node(
    name: Annotated[str, typer.Argument(help="Name or id of the node.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also when it has services: they count as failed then.")
    ] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Forget a node that is gone for good; lock out one that joined by a token, at once."""
    from flops.wire.rest import Message

    with connected() as api:
        answer = api.delete(f"/nodes/{quote(name, safe='')}", Message, force="true" if force else None)
    print_data(answer, output_format, lambda: say(answer.message))


@mock_data.command("create")
def create_mock_data(
    sla: Annotated[Path, typer.Argument(help="JSON file with the mock-data SLA.")],
    watch: Annotated[bool, typer.Option("--watch", help="Wait until the data is stored.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Have mock data providers push a dataset to learner nodes; prints the provider's id."""
    from flops.core.sla import parse_mock_data_sla
    from flops.wire.rest import BlobStored, MockDataCreated

    content = read_sla(sla)
    wanted = parse_mock_data_sla(content).mock_data_configuration
    file = dataset_file(wanted.dataset_name, sla.parent)
    with connected() as api:
        if file is not None:
            say(f"Sends {file} along.")
            content["dataset_blob"] = api.upload(file, BlobStored).digest
            content["mock_data_configuration"]["dataset_name"] = file.name
        created = api.post("/mocks", MockDataCreated, content)
        mock_data_id = created.mock_data_id
        if output_format is OutputFormat.TABLE:
            print_line(mock_data_id)
        say(f"{created.message}.")
        record = _wait_for_data(api, mock_data_id) if watch else None
    data = {"mock_data_id": mock_data_id, "mock_data": record}
    print_data(data, output_format, lambda: None)


def dataset_file(name: str, folder: Path) -> Path | None:
    """The file that a dataset's name stands for; None when it is the name of a known dataset.

    Args:
        name: ``dataset_name`` of an SLA.
        folder: where the SLA's file is; relative paths start there.

    Raises:
        FlopsError: ``file_unreadable`` when the name looks like a path and no such file exists.
    """
    path = (folder / Path(name).expanduser()).resolve()
    if path.is_file():
        return path
    looks_like_path = name.startswith((".", "/", "~")) or path.suffix.lower() in DATASET_SUFFIXES
    if not looks_like_path:
        return None
    raise FlopsError(
        ErrorCode.FILE_UNREADABLE,
        f"dataset_name is {name!r}, and there is no file {path}.",
        hint="Give a file, starting at the SLA's folder, or the name of a dataset; docs/sla.md lists them.",
    )


def _wait_for_data(api: ApiClient, mock_data_id: str) -> MockData:
    from flops.wire.rest import MockDataList

    told = -1
    while True:
        records = api.get("/mocks", MockDataList).mock_data
        record = next((r for r in records if r.id == mock_data_id), None)
        if record is None:
            raise FlopsError(ErrorCode.NOT_FOUND, f"There is no mock data {mock_data_id} any more.", hint="")
        if record.failure is not None:
            raise FlopsError.from_dict(record.failure.model_dump())
        if record.rows != told:
            told = record.rows
            say(f"{told:,} rows pushed to {', '.join(record.nodes)}.")
        if record.state == "completed":
            _wait_until_announced(api, record)
            say(f"Completed: {record.rows:,} rows are stored on {', '.join(record.nodes)}.")
            return record
        time.sleep(_POLL_S)


def _wait_until_announced(api: ApiClient, record: MockData) -> None:
    """Wait until the cluster knows of the rows, so that a project that needs them can be placed at once."""
    from flops.wire.rest import NodeList

    tag = str(record.sla["mock_data_configuration"]["data_tag"])
    deadline = time.monotonic() + _ANNOUNCED_WITHIN_S
    while time.monotonic() < deadline:
        nodes = [node for node in api.get("/nodes", NodeList).nodes if node.id in record.node_ids]
        if sum(node.rows_of((tag,)) for node in nodes) >= record.rows:
            return
        time.sleep(_POLL_S)
    say(f"Not all rows with the tag {tag} are known to the cluster yet: see `flops node list`.")


@mock_data.command("list")
def list_mock_data(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the mock data providers."""
    from flops.wire.rest import MockDataList

    with connected() as api:
        records = api.get("/mocks", MockDataList).mock_data

    def show() -> None:
        rows = [(r.id, r.state, f"{r.rows:,}", ", ".join(r.nodes)) for r in records]
        print_table(["mock data", "state", "rows", "nodes"], rows, empty="There is no mock data yet.")

    print_data(records, output_format, show)


def tracking(
    customer_id: Annotated[str, typer.Option(help="Every customer has the same server.")] = "Admin",
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Print the URL of the MLflow server and its GUI."""
    from flops.wire.rest import TrackingServer

    with connected() as api:
        server = api.get("/tracking", TrackingServer, customerID=customer_id)
    print_data(server, output_format, lambda: print_line(server.tracking_server_url))
