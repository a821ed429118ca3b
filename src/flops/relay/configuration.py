"""What a relay was told when it was started first, kept for later starts."""

from __future__ import annotations

import secrets
from pathlib import Path

from pydantic import Field, ValidationError

from flops.core.model import Value
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError

IDENTITY_FILE = "identity.pem"
LOG_FILE = "relay.log"
WHAT = "cluster's relay"  # in sentences about its process
_FILE = "relay.json"


class RelayConfiguration(Value):
    """Which cluster a relay runs, and where its manager is."""

    cluster: str
    manager: str  # host:port of the manager's cluster
    is_insecure: bool = False  # do without encryption, also to another machine
    relay: str = Field(default_factory=lambda: secrets.token_hex(8))  # this installation

    def save(self, folder: Path) -> None:
        """Keep it in a relay's folder.

        Raises:
            FlopsError: ``disk_full``, ``file_unreadable``.
        """
        write_durably(folder / _FILE, self.model_dump_json())

    @classmethod
    def load(cls, folder: Path) -> RelayConfiguration | None:
        """What was kept; None at the first start.

        Raises:
            FlopsError: ``config_corrupt``, ``file_unreadable``.
        """
        path = folder / _FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise file_error(exc, path) from exc
        except ValidationError as exc:
            raise FlopsError(
                ErrorCode.CONFIG_CORRUPT,
                f"{path}, which says what cluster runs here, cannot be read.",
                hint="Remove it, and give --name and --manager again.",
            ) from exc
