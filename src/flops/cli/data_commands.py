"""``flops data``: the data of one node, by tag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flops.cli.given_file import read_given
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
from flops.wire.flight import TOKEN_FILE, Right

if TYPE_CHECKING:
    from flops.core.dataset import TagDescription, TagLimits
    from flops.data import DataClient

data = typer.Typer(help="Data on a node, by tag: send, list, describe, read, drop.", no_args_is_help=True)

Server = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT", help="The node's ML data server; that of this machine's node if not given."
    ),
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with a token of the data server; likewise.")
]
Home = Annotated[Path | None, typer.Option("--home", help="Folder of the node, as given to NodeEngine.")]
Tag = Annotated[str, typer.Argument(help="The data tag.")]
Rows = Annotated[int | None, typer.Option("--max-rows", min=1, help="Most rows; unlimited if not given.")]
Bytes = Annotated[int | None, typer.Option("--max-bytes", min=1, help="Most bytes; unlimited if not given.")]
Format = FormatOption


@data.command("push")
def push(
    file: Annotated[
        Path,
        typer.Argument(
            help="Parquet, Arrow, CSV or NPZ file, or folder with a sub-folder of images per label."
        ),
    ],
    tag: Annotated[str, typer.Option("--tag", "-t", help="The data tag.")],
    name: Annotated[str, typer.Option(help="Name of the upload; a later one of this name replaces it.")] = "",
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Send data to a node. The same content sent twice is stored once."""
    with _connected(server, token_file, home) as client:
        stored = client.push(file, tag, name=name)
    fragment = stored.fragment
    if stored.is_new:
        say(f"{fragment.rows:,} rows ({fragment.size_bytes:,} bytes) are stored with the tag {tag}.")
    else:
        say(f"These {fragment.rows:,} rows were stored with the tag {tag} already.")
    if stored.dropped:
        say(f"Retention has removed {stored.dropped} older uploads.")
    print_data(stored, output_format, lambda: print_line(fragment.id))


@data.command("list")
def list_tags(
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """List the tags of a node."""
    with _connected(server, token_file, home) as client:
        tags = client.tags()

    def show() -> None:
        rows = [
            (tag.name, f"{tag.rows:,}", f"{tag.size_bytes:,}", _when(tag.last_write_s), _columns(tag.columns))
            for tag in tags
        ]
        print_table(["tag", "rows", "bytes", "last write", "columns"], rows, empty="The node has no data.")

    print_data(tags, output_format, show)


@data.command("describe")
def describe(
    tag: Tag,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Have the node scan all rows of the tag.")
    ] = False,
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Show a tag with its columns, uploads, limits and damage."""
    with _connected(server, token_file, home) as client:
        found = client.describe(tag, is_with_statistics=statistics)
    print_data(found, output_format, lambda: _show_description(found))


@data.command("read")
def read(
    tags: Annotated[list[str], typer.Argument(help="The data tags.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The Parquet file to write.")],
    part: Annotated[int, typer.Option(min=0, help="Which of the parts, from 0.")] = 0,
    parts: Annotated[int, typer.Option(min=1, help="Into how many disjoint parts the rows are split.")] = 1,
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Read the rows of tags back into a Parquet file."""
    from flops.adapters.data_files import save_parquet

    with _connected(server, token_file, home) as client:
        schema, batches = client.stream(*tags, part=part, parts=parts)
        rows = save_parquet(schema, batches, output)
    say(f"{rows:,} rows are written to {output}.")
    print_data({"file": str(output.absolute()), "rows": rows}, output_format, lambda: print_line(str(output)))


@data.command("drop")
def drop(
    tag: Tag,
    name: Annotated[str, typer.Option(help="Drop only this upload; `describe` lists their names.")] = "",
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Remove the data of a tag, or one upload of it."""
    with _connected(server, token_file, home) as client:
        client.drop(tag, name)
    say(
        f"The upload {name} of the tag {tag} is dropped."
        if name
        else f"The data of the tag {tag} are dropped."
    )
    print_data({"tag": tag, "name": name}, output_format, lambda: None)


@data.command("retain")
def retain(
    tag: Tag,
    max_rows: Rows = None,
    max_bytes: Bytes = None,
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Keep only the newest uploads of a tag within these bounds; without any, keep all."""
    with _connected(server, token_file, home) as client:
        limits = client.retain(tag, max_rows=max_rows, max_bytes=max_bytes)
    _print_limits(limits, output_format)


@data.command("quota")
def quota(
    tag: Tag,
    max_rows: Rows = None,
    max_bytes: Bytes = None,
    server: Server = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Refuse uploads that would make a tag larger than this; without bounds, refuse none."""
    with _connected(server, token_file, home) as client:
        limits = client.limit(tag, max_rows=max_rows, max_bytes=max_bytes)
    _print_limits(limits, output_format)


@data.command("token")
def token(
    right: Annotated[Right, typer.Option(help="What the token is good for.")] = Right.WRITE,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", "-t", help="For which tags; repeat it. All if not given.")
    ] = None,
    token_file: TokenFile = None,
    home: Home = None,
    output_format: Format = OutputFormat.TABLE,
) -> None:
    """Make a token for a device from the data server's own: good for these tags and no others."""
    from flops.wire.flight import Scope, check_tag, mint_token
    from flops.wire.server_trust import split_trust, with_trust
    from flops.wiring.data import server_trust

    scope = Scope(right, tuple(check_tag(tag) for tag in tags or ()))
    own, trust = split_trust(_read_token(token_file or _folder(home) / TOKEN_FILE))
    if token_file is None:
        trust = server_trust(_folder(home))
    minted = with_trust(mint_token(own, scope), trust)
    print_data(
        {"token": minted, "right": right, "tags": tags or []}, output_format, lambda: print_line(minted)
    )


@contextmanager
def _connected(server: str | None, token_file: Path | None, home: Path | None) -> Iterator[DataClient]:
    from flops.data import DataClient
    from flops.wire.server_trust import split_trust, with_trust
    from flops.wiring.data import server_trust

    address = server or _local_address(_folder(home))
    token = _read_token(token_file or _folder(home) / TOKEN_FILE)
    if server is None and split_trust(token)[1] is None:
        token = with_trust(token, server_trust(_folder(home)))
    with DataClient(address, token) as client:
        yield client


def _folder(home: Path | None) -> Path:
    from flops.wiring.node_files import node_paths

    return node_paths(home).data_server


def _local_address(folder: Path) -> str:
    import json

    from flops.wire.flight import ENDPOINT_FILE

    try:
        endpoint = json.loads((folder / ENDPOINT_FILE).read_text())
        return f"{endpoint['host']}:{endpoint['port']}"
    except FileNotFoundError as exc:
        raise FlopsError(
            ErrorCode.UNREACHABLE,
            f"No ML data server runs with its state in {folder}.",
            hint="Switch the addon on (`NodeEngine config addon FLOps-learner on`) and start the node; "
            "--home names another node, --server another machine's.",
        ) from exc
    except (OSError, ValueError, KeyError) as exc:
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE, f"{folder / ENDPOINT_FILE} cannot be read: {exc}."
        ) from exc


def _read_token(path: Path) -> str:
    hint = (
        "Name a file with a token of the data server with --token-file; `flops data token` makes "
        "one on the machine of the node."
    )
    return read_given(path, f"The token file {path} cannot be read", hint).strip()


def _show_description(found: TagDescription) -> None:
    print_facts(
        [
            ("Tag", found.tag.name),
            ("Rows", f"{found.tag.rows:,}"),
            ("Bytes", f"{found.tag.size_bytes:,}"),
            ("Last write", _when(found.tag.last_write_s)),
            ("Retention", found.limits.retention),
            ("Quota", found.limits.quota),
        ]
    )
    print_line()
    statistics = found.statistics or {}
    columns = []
    for name, kind in found.tag.columns.items():
        about = statistics.get(name)
        numbers = (about.nulls, about.minimum, about.maximum, about.mean) if about else (None,) * 4
        counts = ", ".join(f"{value}: {n}" for value, n in (about.counts or {}).items()) if about else None
        columns.append((name, kind, *numbers, counts))
    print_table(["column", "type", "nulls", "minimum", "maximum", "mean", "values"], columns)
    print_line()
    uploads = [(f.id, f"{f.rows:,}", f"{f.size_bytes:,}", _when(f.stored_at_s)) for f in found.fragments]
    print_table(["upload", "rows", "bytes", "stored"], uploads, empty="The tag has no data.")
    for damage in found.damaged:
        say(f"Damaged and put aside: {damage.path}: {damage.reason}")


def _print_limits(limits: TagLimits, output_format: OutputFormat) -> None:
    facts = [("Retention", limits.retention), ("Quota", limits.quota)]
    print_data(limits, output_format, lambda: print_facts(facts))


def _columns(columns: dict[str, str]) -> str:
    shown = [f"{name} ({kind})" for name, kind in columns.items()]
    return ", ".join(shown[:4]) + (f", {len(shown) - 4} more" if len(shown) > 4 else "")


def _when(seconds: float) -> str:
    return timestamp(seconds) if seconds else ""
