"""The clusters of a federation, in one JSON file."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flops.core.clusters import Cluster
from flops.durable_file import file_error, write_durably
from flops.errors import ErrorCode, FlopsError

_CLUSTERS = TypeAdapter(list[Cluster])


class FileClusterRegister:
    """Implements `flops.admission_ports.ClusterRegister`.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> list[Cluster]:
        """All that was saved last; see `ClusterRegister`."""
        try:
            return _CLUSTERS.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise file_error(exc, self._path) from exc
        except ValidationError as exc:
            raise FlopsError(
                ErrorCode.CONFIG_CORRUPT,
                f"The list of clusters in {self._path} cannot be read.",
                hint="Put it back from a backup, or remove it: clusters that are there are listed anew.",
            ) from exc

    def save(self, clusters: list[Cluster]) -> None:
        """Replace what was saved; see `ClusterRegister`."""
        write_durably(self._path, _CLUSTERS.dump_json(clusters, indent=1).decode())
