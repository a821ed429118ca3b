"""``flops node``, ``mock-data``, ``model`` and ``tracking``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flops.cli.connection import connected, read_sla
from flops.cli.output import FormatOption, OutputFormat, print_data, print_line, print_table, say
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient

node = typer.Typer(help="Nodes of the cluster.", no_args_is_help=True)
mock_data = typer.Typer(help="Mock data providers stand in for devices.", no_args_is_help=True)
model = typer.Typer(help="Trained models.", no_args_is_help=True)

_POLL_S = 0.3


@node.command("list")
def list_nodes(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the nodes with their addons and data tags."""
    from flops.wire.rest import NodeList

    with connected() as api:
        nodes = api.get("/nodes", NodeList).nodes

    def show() -> None:
        rows = [
            (
                n.name,
                "connected" if n.is_connected else "gone",
                ", ".join(f"{a.name} ({a.state})" for a in n.addons),
                ", ".join(f"{t.name} ({t.rows:,} rows)" for t in n.data_tags),
                f"{n.facts.architecture}, {n.facts.cpu_cores} cores, {n.facts.memory_mb:,} MB",
            )
            for n in nodes
        ]
        print_table(
            ["node", "state", "addons", "data tags", "machine"], rows, empty="No node has joined yet."
        )

    print_data(nodes, output_format, show)


@mock_data.command("create")
def create_mock_data(
    sla: Annotated[Path, typer.Argument(help="JSON file with the mock-data SLA.")],
    watch: Annotated[bool, typer.Option("--watch", help="Wait until the data is stored.")] = False,
) -> None:
    """Have mock data providers push a dataset to learner nodes; prints the provider's id."""
    from flops.core.sla import parse_mock_data_sla
    from flops.wire.rest import BlobStored, MockDataCreated

    content = read_sla(sla)
    wanted = parse_mock_data_sla(content).mock_data_configuration
    dataset = sla.parent / wanted.dataset_name
    with connected() as api:
        if dataset.is_file():
            content["dataset_blob"] = api.post("/blobs", BlobStored, dataset.read_bytes()).digest
        created = api.post("/mocks", MockDataCreated, content)
        print_line(created.mock_data_id)
        say(created.message)
        while watch and not _is_pushed(api, created.mock_data_id):
            time.sleep(_POLL_S)


def _is_pushed(api: ApiClient, mock_data_id: str) -> bool:
    from flops.wire.rest import MockDataList

    record = next(r for r in api.get("/mocks", MockDataList).mock_data if r.id == mock_data_id)
    if record.failure is not None:
        raise FlopsError.from_dict(record.failure.model_dump())
    if record.state == "completed":
        say(f"{record.rows:,} rows are stored on {', '.join(record.nodes)}.")
    return record.state == "completed"


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


@model.command("list")
def list_models(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the trained models."""
    from flops.wire.rest import ModelList

    with connected() as api:
        models = api.get("/models", ModelList).models

    def show() -> None:
        rows = [
            (
                m.project_id,
                m.name,
                m.version,
                m.round,
                "" if m.accuracy is None else f"{m.accuracy:.4f}",
                m.inference_url,
            )
            for m in models
        ]
        columns = ["project", "model", "version", "round", "accuracy", "inference"]
        print_table(columns, rows, empty="No model has been trained yet.")

    print_data(models, output_format, show)


def tracking(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Print the URL of the MLflow server and its GUI."""
    from flops.wire.rest import TrackingServer

    with connected() as api:
        server = api.get("/tracking", TrackingServer)
    print_data(server, output_format, lambda: print_line(server.tracking_server_url))


@model.command()
def predict(
    project_id: Annotated[str, typer.Argument(help="Id of the project whose model is served.")],
    file: Annotated[Path, typer.Argument(help="Parquet, CSV or NPZ file with rows for the model.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Send only the first rows.")] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Send rows to a served model; prints predictions, beside labels when the file has them."""
    from flops.cli.prediction import predict_file

    with connected() as api:
        project = api.project(project_id)
    if not project.inference_url:
        raise FlopsError(
            ErrorCode.MODEL_NOT_FOUND,
            f"Project {project_id} serves no model: it is {project.stage}.",
            hint="A model is served when post_training_steps asks for it, after the training.",
        )
    result = predict_file(project.inference_url, file, limit)

    def show() -> None:
        print_table(["row", "prediction", "label"], [(r.row, r.prediction, r.label) for r in result.rows])
        if result.accuracy is not None:
            print_line(f"Accuracy on {len(result.rows):,} rows: {result.accuracy:.3f}")

    print_data(result, output_format, show)
