"""``flops model``: trained models, which versions of them are deployed where, and their predictions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer

from flops.cli.connection import connected
from flops.cli.output import (
    FormatOption,
    OutputFormat,
    print_data,
    print_facts,
    print_line,
    print_table,
    say,
    timestamp,
)
from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.core.deployment import Deployment
    from flops.wire.rest import Model

model = typer.Typer(help="Trained models.", no_args_is_help=True)

_POLL_S = 0.3

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Name of the model.")]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Do not wait until the version answers.")]


@model.command("list")
def list_models(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List the versions of trained models with their numbers, and where they are served."""
    from flops.wire.rest import ModelList

    with connected() as api:
        models = api.get("/models", ModelList).models
    print_data(models, output_format, lambda: _print_models(models))


@model.command("show")
def show_model(name: ModelArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show a model: its versions, what is deployed where, and what was deployed before."""
    from flops.wire.rest import ModelList

    with connected() as api:
        versions = [m for m in api.get("/models", ModelList).models if m.name == name]
        record = _find_deployment(api, name)

    def show() -> None:
        _print_models(versions)
        if record is None:
            say(f"Model {name} was never deployed.")
            return
        serving = record.serving
        facts = [
            ("State", record.state),
            ("Doing", record.doing),
            ("Address", record.url or (f"port {record.port} of {record.node}" if record.port else "")),
            ("Version", serving.version if serving is not None else ""),
            ("Last failure", record.failure.message if record.failure is not None else ""),
        ]
        print_facts([(name, value) for name, value in facts if value])
        rows = [
            (
                line.version,
                line.project_id,
                line.node,
                line.reason,
                timestamp(line.since_s),
                _until(line.until_s),
            )
            for line in reversed(record.history)
        ]
        columns = ["version", "project", "node", "why", "from", "until"]
        print_table(columns, rows, empty="No version has answered yet.")

    print_data({"versions": versions, "deployment": record}, output_format, show)


@model.command("deploy")
def deploy_model(
    name: ModelArgument,
    version: Annotated[str | None, typer.Option(help="Which version [the newest].")] = None,
    node: Annotated[
        str | None, typer.Option(help="Name or id of the node [the one it is on, or any that can take it].")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65_535, help="Port [the one it has, or the first free one].")
    ] = None,
    no_wait: NoWaitOption = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Serve a version of a model at an address that stays; prints the URL when it answers."""
    from flops.core.deployment import Deployment

    wanted = {"version": version, "node": node, "port": port}
    with connected() as api:
        begun = api.post(
            deployment_path(name), Deployment, {k: v for k, v in wanted.items() if v is not None}
        )
        _finish(api, begun, output_format, is_awaited=not no_wait)


@model.command("rollback")
def roll_model_back(
    name: ModelArgument, no_wait: NoWaitOption = False, output_format: FormatOption = OutputFormat.TABLE
) -> None:
    """Serve the version that was deployed before; prints the URL when it answers."""
    from flops.core.deployment import Deployment

    with connected() as api:
        begun = api.post(f"{deployment_path(name)}/rollback", Deployment)
        _finish(api, begun, output_format, is_awaited=not no_wait)


@model.command("undeploy")
def undeploy_model(name: ModelArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Stop what serves a model. Its address is kept for the next version."""
    from flops.core.deployment import Deployment

    with connected() as api:
        record = api.delete(deployment_path(name), Deployment)
    print_data(record, output_format, lambda: say(f"Model {name} is not served any more."))


@model.command()
def predict(
    name: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Name of a deployed model, or id of a project that serves its."),
    ],
    file: Annotated[
        Path, typer.Argument(help="Parquet, Arrow, CSV, NPZ or JSON file with rows, or folder of images.")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Send only the first rows.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column to keep back and to show beside [label, labels, target, y].")
    ] = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Send rows to a served model; prints predictions, beside labels when the file has them."""
    from flops.cli.prediction import predict_file

    with connected() as api:
        url = _served_at(api, name)
    result = predict_file(url, file, limit, label)

    def show() -> None:
        has_labels = any(row.label is not None for row in result.rows)
        columns = ["row", "prediction", "label"] if has_labels else ["row", "prediction"]
        print_table(columns, [(r.row, r.prediction, r.label)[: len(columns)] for r in result.rows])

    print_data(result, output_format, show)
    if result.accuracy is not None:
        say(f"Accuracy on {len(result.rows):,} rows: {result.accuracy:.3f}")


def deployment_path(name: str) -> str:
    """The path of a model's deployment, whatever a user typed as its name."""
    return f"/models/{quote(name, safe='')}/deployment"


def _finish(api: ApiClient, begun: Deployment, output_format: OutputFormat, *, is_awaited: bool) -> None:
    record = _wait_until_it_answers(api, begun) if is_awaited else begun

    def show() -> None:
        if record.starting is None:
            print_line(record.url)

    print_data(record, output_format, show)


def _wait_until_it_answers(api: ApiClient, begun: Deployment) -> Deployment:
    """Follow a deployment, also over a restart of the manager.

    Raises:
        FlopsError: why the version did not come up; ``conflict`` when something else was wanted meanwhile.
    """
    wanted = begun.starting
    if wanted is None:
        return begun
    record, told = begun, ""
    while record.starting is not None and record.starting.version == wanted.version:
        if record.doing != told:
            told = record.doing
            say(told)
        time.sleep(_POLL_S)
        record = _patiently(api, begun.name)
    if record.starting is None and record.failure is not None:
        say(record.doing)
        raise FlopsError.from_dict(record.failure.model_dump())
    if record.starting is not None or record.serving is None or record.serving.version != wanted.version:
        message = f"Something else was asked for meanwhile: {record.doing or record.state}"
        raise FlopsError(ErrorCode.CONFLICT, message)
    say(f"Version {wanted.version} of model {record.name} answers on {record.node}.")
    return record


def _patiently(api: ApiClient, name: str) -> Deployment:
    """A deployment's record, from a manager that may be about to come back."""
    from flops.cli.api_client import GIVE_UP_AFTER_S, RECONNECT_AFTER_S
    from flops.core.deployment import Deployment

    away_since = time.monotonic()
    while True:
        try:
            return api.get(deployment_path(name), Deployment)
        except FlopsError as exc:
            if exc.code is not ErrorCode.UNREACHABLE or time.monotonic() - away_since > GIVE_UP_AFTER_S:
                raise
        time.sleep(RECONNECT_AFTER_S)


def _find_deployment(api: ApiClient, name: str) -> Deployment | None:
    """The record of a model that was deployed before, None when it never was.

    Raises:
        FlopsError: ``model_not_found``, or as `ApiClient.get`.
    """
    from flops.core.deployment import Deployment

    try:
        return api.get(deployment_path(name), Deployment)
    except FlopsError as exc:
        if exc.code is ErrorCode.NOT_DEPLOYED:
            return None
        raise


def _served_at(api: ApiClient, name: str) -> str:
    """Where a model answers, or that of a project.

    Raises:
        FlopsError: ``not_deployed``, ``model_not_found``.
    """
    from flops.core.deployment import Deployment

    try:
        record = api.get(deployment_path(name), Deployment)
    except FlopsError as exc:
        if exc.code is not ErrorCode.MODEL_NOT_FOUND:
            raise
        return _served_by_project(api, name, exc)
    if not record.url:
        raise FlopsError(ErrorCode.NOT_DEPLOYED, f"Model {name!r} is not served: it is {record.state}.")
    return record.url


def _served_by_project(api: ApiClient, name: str, unknown_model: FlopsError) -> str:
    try:
        project = api.project(name)
    except FlopsError as exc:
        raise unknown_model if exc.code is ErrorCode.PROJECT_NOT_FOUND else exc from exc
    if not project.inference_url:
        raise FlopsError(
            ErrorCode.MODEL_NOT_FOUND,
            f"Project {name} serves no model: it is {project.stage}.",
            hint="A model is served after the training when post_training_steps asks for it, or by "
            "`flops model deploy`.",
        )
    return project.inference_url


def _print_models(models: Any) -> None:
    rows = [
        (m.name, m.version, m.project_id, m.round, _number(m.accuracy), _number(m.loss), _where(m))
        for m in models
    ]
    columns = ["model", "version", "project", "round", "accuracy", "loss", "served at"]
    print_table(columns, rows, empty="No model has been trained yet.")


def _where(version: Model) -> str:
    deployed = f"{version.deployment_url or version.deployment} ({version.deployment_node})"
    return ", ".join(filter(None, [deployed if version.deployment else "", version.inference_url]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _until(seconds: float | None) -> str:
    return "now" if seconds is None else timestamp(seconds)
