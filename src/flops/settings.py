"""Settings of each process, read once from the environment. Nothing else reads the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flops.core.health import is_loopback
from flops.errors import ErrorCode, FlopsError


class Settings(BaseModel):
    """Base: each field is read from ``FLOPS_<FIELD>``; keyword arguments win over the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_arguments(cls, arguments: Iterable[str]) -> Self:
        """Read the settings of a process from its arguments, see `arguments_of`, and the environment.

        Raises:
            FlopsError: as `read`.
        """
        pairs = (argument.removeprefix("--").split("=", 1) for argument in arguments)
        return cls.read(None, **{name.replace("-", "_"): value for name, value in pairs})

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **given: Any) -> Self:
        """Read the settings.

        Args:
            environ: environment to read, the process's own when None.
            given: values that win over the environment; None stands for "not given".

        Raises:
            FlopsError: ``config_invalid``, naming the variable and its value.
        """
        source = os.environ if environ is None else environ
        values: dict[str, Any] = {
            name: source[f"FLOPS_{name.upper()}"]
            for name in cls.model_fields
            if f"FLOPS_{name.upper()}" in source
        }
        values.update({name: value for name, value in given.items() if value is not None})
        try:
            return cls(**values)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            name = "_".join(str(part) for part in first["loc"])
            raise FlopsError(
                ErrorCode.CONFIG_INVALID, f"FLOPS_{name.upper()} is {first['input']!r}: {first['msg']}."
            ) from exc


def arguments_of(given: Mapping[str, Any]) -> list[str]:
    """Settings as arguments of a process that reads them by `Settings.from_arguments`; None is left out."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


def default_home() -> Path:
    """``~/.local/share/flops``, or what the platform uses instead."""
    return Path(platformdirs.user_data_dir("flops"))


class ControlSettings(Settings):
    """The control plane: manager, cluster orchestrator and MLflow server."""

    home: Path = Field(default_factory=default_home, description="folder of all state; FLOPS_HOME")
    host: str = Field("127.0.0.1", description="address the manager listens on, and MLflow by its port")
    manager_port: int = Field(5072, ge=0, le=65_535, description="port of the REST API")
    cluster_host: str = Field("127.0.0.1", description="address that NodeEngines dial")
    cluster_port: int = Field(10_100, ge=0, le=65_535, description="port that NodeEngines dial")
    tracking_port: int = Field(7027, ge=0, le=65_535, description="port of the MLflow server and its GUI")
    encryption: str = Field(
        "auto",
        pattern="^(auto|on|off)$",
        description="whether nodes join by token and TLS: `on`, `off`, or `auto`: unless on loopback",
    )
    tls_certificate: Path | None = Field(
        None, description="the manager's own certificate, PEM; one by the cluster's authority if not given"
    )
    tls_key: Path | None = Field(None, description="its key, PEM; in the same file if not given")
    certificate_hours: float = Field(168.0, gt=0, description="life of a certificate; renewed at two thirds")
    inference_port: int = Field(8080, ge=1, le=65_535, description="first port tried by inference services")
    load_timeout_s: int = Field(
        600, ge=1, description="longest loading of a learner's code and data without a new row, in seconds"
    )
    packaging: str = Field(
        "environment",
        pattern="^(environment|image)$",
        description="what projects run from whose SLA does not say: `environment` or `image`",
    )
    registry: str | None = Field(
        None, description="`host:port` of the registry for images; the control plane's own if not given"
    )
    base_image: str | None = Field(
        None,
        description="image with Python that images are put on; one of Debian's packages if not given",
    )
    package_index: str | None = Field(
        None,
        pattern="^https?://",
        description="index from which the cluster fetches packages for its nodes; each fetches by itself if "
        "not given",
    )
    registry_mb: int = Field(
        51_200, ge=0, description="size in MiB beyond which images leave the registry that nothing uses"
    )
    max_blob_mb: int = Field(16_384, ge=1, description="largest repository, lock or model taken in, in MiB")
    keep_logs_projects: int = Field(200, ge=0, description="of how many ended projects output is kept")
    keep_logs_days: float = Field(30.0, ge=0, description="how many days it is kept after a project's end")
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @property
    def control_dir(self) -> Path:
        """State of the control plane."""
        return self.home / "control"

    def encrypts(self, host: str) -> bool:
        """Whether what listens at an address encrypts."""
        return self.encryption == "on" or (self.encryption == "auto" and not is_loopback(host))


class RelaySettings(Settings):
    """A relay: the cluster orchestrator of a further cluster. What `flops cluster up` was told it keeps."""

    home: Path = Field(default_factory=default_home, description="folder of all state; FLOPS_HOME")
    cluster_host: str = Field("127.0.0.1", description="address that the cluster's NodeEngines dial")
    cluster_port: int = Field(10_100, ge=0, le=65_535, description="port that they dial")
    site_cache_mb: int = Field(
        20_480, ge=0, description="disk for blobs and layers that the site's nodes share, in MiB"
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")

    @property
    def relay_dir(self) -> Path:
        """State of the relay."""
        return self.home / "relay"


class ClientSettings(Settings):
    """The `flops` command: which manager it talks to."""

    home: Path = Field(default_factory=default_home, description="folder of all state; FLOPS_HOME")
    url: str | None = Field(None, description="base URL of the manager; found in the home if not given")
    token_file: Path | None = Field(None, description="file with the manager's admin token; likewise")
    authority_file: Path | None = Field(
        None, description="certificate of the authority that the manager at `url` is known by, PEM"
    )
    insecure: bool = Field(False, description="whether to do without encryption, also to another machine")

    @property
    def control_dir(self) -> Path:
        """State of the control plane that runs from this home."""
        return self.home / "control"


class NodeSettings(Settings):
    """A NodeEngine. What an operator configures for good stands in conf.json; this is the rest."""

    home: Path = Field(default_factory=default_home, description="folder of all state; FLOPS_HOME")
    node_home: Path | None = Field(None, description="what --home names: state and conf.json of one node")
    data_port: int = Field(
        11_027, ge=0, le=65_535, description="port of the ML data server; a free one if taken"
    )
    cache_mb: int = Field(20_480, ge=0, description="disk for cached environments and bundles, in MiB")
    image_cache_mb: int = Field(20_480, ge=0, description="disk for parts of images, in MiB")
    uv_cache_mb: int | None = Field(None, ge=0, description="size in MiB beyond which uv's cache is emptied")
    container_socket: Path | None = Field(
        None, description="socket of Docker or Podman; found if not given; DOCKER_HOST"
    )
    open_network: str = Field(
        "off",
        pattern="^(on|off)$",
        description="`on`: users' code may dial any address, and not only what its service needs",
    )
    log_level: str = Field("INFO", description="DEBUG, INFO, WARNING or ERROR")


def inherited_environment() -> dict[str, str]:
    """The environment child processes start from: this process's own."""
    return dict(os.environ)


def quiet_libraries() -> None:
    """Have libraries of this process and its children call nobody: no telemetry, no look for updates."""
    for name, value in (
        ("FLWR_TELEMETRY_ENABLED", "0"),
        ("FLWR_DISABLE_UPDATE_CHECK", "1"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
    ):
        os.environ[name] = value
