"""How commands find their manager, and how they read the SLA files that users name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flops.errors import ErrorCode, FlopsError

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.settings import ClientSettings


@dataclass(frozen=True)
class GlobalOptions:
    """What stands between ``flops`` and its command; None is "not given"."""

    home: Path | None = None
    url: str | None = None
    token_file: Path | None = None


def global_options() -> GlobalOptions:
    """The options given before the command that runs now."""
    found = click.get_current_context().find_root().obj
    return found if isinstance(found, GlobalOptions) else GlobalOptions()


def client_settings(home: Path | None = None) -> ClientSettings:
    """Settings of the client: a command's own ``--home`` wins, then the global options, then the environment.

    Raises:
        FlopsError: ``config_invalid``.
    """
    from flops.settings import ClientSettings

    given = global_options()
    return ClientSettings.read(home=home or given.home, url=given.url, token_file=given.token_file)


@contextmanager
def connected(home: Path | None = None) -> Iterator[ApiClient]:
    """A client of the manager that the settings name, or of the control plane on this machine.

    Raises:
        FlopsError: ``unreachable`` when no control plane runs, ``file_unreadable`` for the token.
    """
    from flops.cli.api_client import ApiClient
    from flops.cli.control import read_endpoint
    from flops.control.lifetime import ADMIN_TOKEN_FILE

    settings = client_settings(home)
    url = settings.url
    if url is None:
        endpoint = read_endpoint(settings.control_dir)
        if endpoint is None:
            raise FlopsError(
                ErrorCode.UNREACHABLE,
                f"No control plane runs with its state in {settings.control_dir}.",
                hint="Start it with `flops up`; --home names another home, --url another manager.",
            )
        url = endpoint["manager_url"]
    client = ApiClient(url, settings.token_file or settings.control_dir / ADMIN_TOKEN_FILE)
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
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_number)
    except OSError as exc:
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} cannot be read: {exc.strerror}.") from exc
    except RecursionError as exc:
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} is nested too deeply.") from exc
    except ValueError as exc:
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} is not JSON: {exc}.") from exc
    if not isinstance(content, dict):
        raise FlopsError(ErrorCode.SLA_UNREADABLE, f"{path} holds no JSON object.")
    return content


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
