"""``flops image``: images in the control plane's registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flops.cli.connection import connected
from flops.cli.output import FormatOption, OutputFormat, print_data, print_table, say, timestamp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flops.wire.rest import Image

image = typer.Typer(help="Images in the registry.", no_args_is_help=True)

_MB = 1_000_000


@image.command("list")
def list_images(output_format: FormatOption = OutputFormat.TABLE) -> None:
    """List images with their size, what of it is theirs alone, and what uses them."""
    from flops.wire.rest import ImageList

    with connected() as api:
        found = api.get("/images", ImageList)

    def show() -> None:
        _print_images(found.images, empty="The registry has no images.")
        if found.images:
            say(
                f"{_mb(found.size_bytes)} in all, what images share counted once; "
                f"the registry may have {_mb(found.max_bytes)}."
            )

    print_data(found, output_format, show)


@image.command("prune")
def prune_images(
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Remove all images that no project in progress and no deployed model uses."""
    from flops.wire.rest import PrunedImages

    with connected() as api:
        done = api.post(f"/images/prune?dry_run={str(is_dry_run).lower()}", PrunedImages)

    def show() -> None:
        _print_images(done.images, empty="Every image is in use.")
        if not done.images:
            return
        count = f"{len(done.images)} image{'s' if len(done.images) > 1 else ''}"
        if is_dry_run:
            say(f"{count} would be removed, and {_mb(done.size_bytes)} given back.")
            return
        say(f"Removed {count}, and gave back {_mb(done.freed_bytes)}.")
        if done.freed_bytes < 0.9 * done.size_bytes:
            say(f"What is left of {_mb(done.size_bytes)} was used just now, and goes within the hour.")
        say("Nodes remove what they have of them within the hour, too.")

    print_data(done, output_format, show)


def _print_images(images: Sequence[Image], *, empty: str) -> None:
    rows = [
        (
            f"{image.name}:{image.tags[-1]}" if image.tags else image.name,
            image.project_id,
            ", ".join(platform.removeprefix("linux/") for platform in image.platforms),
            _mb(image.size_bytes),
            _mb(image.own_bytes),
            timestamp(image.used_at_s),
            image.use,
        )
        for image in images
    ]
    print_table(
        ["image", "project", "platforms", "size", "of its own", "last used", "in use"], rows, empty=empty
    )


def _mb(count: int) -> str:
    return f"{count / _MB:.1f} MB"
