"""How commands find their manager, and how they read the SLA files that users name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from flops.cli.given_file import read_given
from flops.errors import ErrorCode, FlopsError

CONNECTION_FILE = "connection.json"  # in the home: what `flops connect` keeps

if TYPE_CHECKING:
    from flops.cli.api_client import ApiClient
    from flops.settings import ClientSettings


@dataclass(frozen=True)
class GlobalOptions:
    """What stands between ``flops`` and its command; None is "not given"."""

    home: Path | None = None
    url: str | None = None
    token_file: Path | None = None
    authority_file: Path | None = None
    insecure: bool | None = None


@dataclass(frozen=True)
class Manager:
    """A manager, and how it is spoken to.

    Args:
        url: its base URL.
        token: its admin token.
        authority: certificate that it is known by, PEM; "" for one that this machine trusts anyway.
    """

    url: str
    token: str = field(repr=False)
    authority: str = ""


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
    return ClientSettings.read(
        home=home or given.home,
        url=given.url,
        token_file=given.token_file,
        authority_file=given.authority_file,
        insecure=given.insecure,
    )


def find_manager(settings: ClientSettings) -> Manager:
    """The manager that the settings name, else of this home's control plane, else that of `flops connect`.

    Raises:
        FlopsError: ``unreachable`` when there is none, ``file_unreadable`` for what it takes to speak to it,
            ``encryption_mismatch`` for one on another machine without encryption.
    """
    from flops.cli.control import read_endpoint
    from flops.control.lifetime import ADMIN_TOKEN_FILE

    token_file = settings.token_file or settings.control_dir / ADMIN_TOKEN_FILE
    if settings.url is not None:
        if not settings.insecure:
            refuse_plain(settings.url)
        return Manager(settings.url, read_token(token_file), _read_authority(settings.authority_file))
    endpoint = read_endpoint(settings.control_dir)
    if endpoint is not None:
        file = endpoint.get("authority_file")
        authority = _read_authority(Path(file) if file else None)
        return Manager(endpoint["manager_url"], read_token(token_file), authority)
    kept = kept_connection(settings.home)
    if kept is not None:
        return kept
    raise FlopsError(
        ErrorCode.UNREACHABLE,
        f"No control plane runs with its state in {settings.control_dir}.",
        hint="Start it with `flops up`, or connect to one elsewhere: `flops connect LINE`.",
    )


def is_elsewhere(settings: ClientSettings) -> bool:
    """Whether `find_manager` finds one that is not this home's: named, or kept while none runs here."""
    from flops.cli.control import read_endpoint

    if settings.url is not None:
        return True
    return (settings.home / CONNECTION_FILE).exists() and read_endpoint(settings.control_dir) is None


@contextmanager
def connected(home: Path | None = None) -> Iterator[ApiClient]:
    """A client of the manager that `find_manager` finds; raises likewise."""
    from flops.cli.api_client import ApiClient

    manager = find_manager(client_settings(home))
    client = ApiClient(manager.url, manager.token, authority=manager.authority)
    try:
        yield client
    finally:
        client.close()


def kept_connection(home: Path) -> Manager | None:
    """What `flops connect` has kept; None if nothing.

    Raises:
        FlopsError: ``file_unreadable``.
    """
    path = home / CONNECTION_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Manager(str(raw["url"]), str(raw["token"]), str(raw["authority"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise FlopsError(
            ErrorCode.FILE_UNREADABLE,
            f"The connection in {path} cannot be read: {exc}.",
            hint="`flops connect LINE` writes it anew.",
        ) from exc


def read_token(path: Path) -> str:
    """A manager's admin token.

    Raises:
        FlopsError: ``file_unreadable``.
    """
    failure = f"The admin token cannot be read from {path}"
    hint = "Name its file with --token-file or FLOPS_TOKEN_FILE; `flops up` printed where it is."
    token = read_given(path, failure, hint).strip()
    if not token or not token.isascii() or not token.isprintable():
        raise FlopsError(ErrorCode.FILE_UNREADABLE, f"{path} holds no token.")
    return token


def _read_authority(path: Path | None) -> str:
    if path is None:
        return ""
    failure = f"The certificate of the authority cannot be read from {path}"
    hint = "Name a copy of `control/authority.crt` with --authority-file or FLOPS_AUTHORITY_FILE."
    return read_given(path, failure, hint, encoding="ascii")


def refuse_plain(url: str) -> None:
    """Refuse a manager on another machine whose address is without encryption.

    Raises:
        FlopsError: ``encryption_mismatch``; ``usage`` for what is no URL.
    """
    from flops.cli.api_client import host_of
    from flops.core.health import is_loopback

    if not is_loopback(host_of(url)) and url.lower().startswith("http:"):
        raise FlopsError(
            ErrorCode.ENCRYPTION_MISMATCH,
            f"The manager at {url} is on another machine, and its address says that it does not encrypt.",
            hint="Use its https:// address; `flops status --connect` there prints a line for `flops connect` "
            "here. Only in a network that you trust, --insecure does without encryption.",
        )


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
