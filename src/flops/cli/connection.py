"""How commands find their manager and read the files that users name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient


@contextmanager
def connected() -> Iterator[ApiClient]:
    """A client of the manager that the settings name, or of the control plane on this machine.

    Raises:
        FlopsError: ``unreachable`` when no control plane runs, ``file_unreadable`` for the token.
    """
    from flops.cli.api_client import ApiClient
    from flops.cli.control import read_endpoint
    from flops.settings import ClientSettings

    settings = ClientSettings.read()
    url = settings.url
    if url is None:
        endpoint = read_endpoint(settings.control_dir)
        if endpoint is None:
            raise FlopsError(
                ErrorCode.UNREACHABLE,
                f"No control plane runs with its state in {settings.control_dir}.",
                hint="Start it with `flops up`; FLOPS_HOME names another home, FLOPS_URL another manager.",
            )
        url = endpoint["manager_url"]
    client = ApiClient(url, settings.token_file or settings.control_dir / "admin.token")
    try:
        yield client
    finally:
        client.close()


def read_sla(path: Path) -> dict[str, Any]:
    """Read an SLA from a JSON file.

    Raises:
        FlopsError: ``sla_unreadable``, naming the file and the place.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as exc:
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} cannot be read: {exc.strerror}.") from exc
    except ValueError as exc:
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} is not JSON: {exc}.") from exc
    if not isinstance(content, dict):
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} holds no JSON object.")
    return content
