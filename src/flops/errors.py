"""The one catalogue of errors: a code, an HTTP status, an exit code, and a hint for each.

A message says what happened and where; it is written where the error is raised. What holds for every
occurrence of a code (status, exit code, what to do about it) stands here, once.

This module is part of the actor kit: it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every error a user can meet. Clients decide by code, never by text."""

    # General
    INTERNAL = "internal"
    USAGE = "usage"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    PORT_OCCUPIED = "port_occupied"
    DISK_FULL = "disk_full"
    PYTHON_UNSUPPORTED = "python_unsupported"
    ALREADY_RUNNING = "already_running"
    NOT_RUNNING = "not_running"
    FILE_UNREADABLE = "file_unreadable"
    CONFIG_CORRUPT = "config_corrupt"
    CONFIG_INVALID = "config_invalid"
    UNHEALTHY = "unhealthy"

    # Projects and their SLA
    SLA_INVALID = "sla_invalid"
    SLA_UNREADABLE = "sla_unreadable"
    PROJECT_NOT_FOUND = "project_not_found"
    PLACEMENT_IMPOSSIBLE = "placement_impossible"

    # ML repositories and environments
    REPO_UNREACHABLE = "repo_unreachable"
    REPO_REF_NOT_FOUND = "repo_ref_not_found"
    REPO_CONTRACT_BROKEN = "repo_contract_broken"
    DEPENDENCIES_INVALID = "dependencies_invalid"
    DEPENDENCIES_UNRESOLVABLE = "dependencies_unresolvable"
    ENVIRONMENT_BUILD_FAILED = "environment_build_failed"

    # Training
    USER_CODE_FAILED = "user_code_failed"
    NO_MATCHING_DATA = "no_matching_data"
    TOO_FEW_LEARNERS = "too_few_learners"
    ROUND_FAILED = "round_failed"
    AGGREGATION_FAILED = "aggregation_failed"
    STRATEGY_INVALID = "strategy_invalid"
    MODEL_EXPORT_FAILED = "model_export_failed"
    TRACKING_FAILED = "tracking_failed"

    # Nodes and services
    NODE_NOT_FOUND = "node_not_found"
    NODE_LOST = "node_lost"
    CLUSTER_NOT_FOUND = "cluster_not_found"
    ADDON_UNKNOWN = "addon_unknown"
    ADDON_UNHEALTHY = "addon_unhealthy"
    SERVICE_NOT_FOUND = "service_not_found"
    SERVICE_FAILED = "service_failed"
    OUT_OF_MEMORY = "out_of_memory"
    OUT_OF_STORAGE = "out_of_storage"
    JOIN_REFUSED = "join_refused"
    CERTIFICATE_REFUSED = "certificate_refused"
    ENCRYPTION_MISMATCH = "encryption_mismatch"

    # Data
    TAG_INVALID = "tag_invalid"
    NAME_INVALID = "name_invalid"
    TAG_NOT_FOUND = "tag_not_found"
    FRAGMENT_NOT_FOUND = "fragment_not_found"
    FRAGMENT_DAMAGED = "fragment_damaged"
    SCHEMA_MISMATCH = "schema_mismatch"
    UPLOAD_INCOMPLETE = "upload_incomplete"
    DATA_EMPTY = "data_empty"
    DATA_FORMAT_UNKNOWN = "data_format_unknown"
    QUOTA_EXCEEDED = "quota_exceeded"
    DATASET_UNKNOWN = "dataset_unknown"
    PARTITIONING_INVALID = "partitioning_invalid"

    # Inference
    INPUT_INVALID = "input_invalid"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_UNLOADABLE = "model_unloadable"
    MODEL_DEPLOYED = "model_deployed"
    NOT_DEPLOYED = "not_deployed"
    ROLLBACK_IMPOSSIBLE = "rollback_impossible"

    # Images and registries
    IMAGE_NAME_INVALID = "image_name_invalid"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_DAMAGED = "image_damaged"
    IMAGE_BUILD_FAILED = "image_build_failed"
    DOCKERFILE_FAILED = "dockerfile_failed"
    REGISTRY_UNREACHABLE = "registry_unreachable"
    REGISTRY_REFUSED = "registry_refused"


@dataclass(frozen=True)
class ErrorSpec:
    """What holds for every occurrence of a code."""

    http_status: int
    exit_code: int
    hint: str


CATALOGUE: Mapping[ErrorCode, ErrorSpec] = {
    ErrorCode.INTERNAL: ErrorSpec(
        500, 100, "This is a defect of FLOps. Look for the request id in the log, and report it."
    ),
    ErrorCode.USAGE: ErrorSpec(400, 2, "See --help for the accepted arguments."),
    ErrorCode.NOT_FOUND: ErrorSpec(404, 4, "Check the address; /docs lists every endpoint."),
    ErrorCode.CONFLICT: ErrorSpec(409, 5, "Look at the current state first, then try again."),
    ErrorCode.UNAUTHENTICATED: ErrorSpec(
        401, 6, "Send the token as 'Authorization: Bearer …'; `flops status` says where the token file is."
    ),
    ErrorCode.FORBIDDEN: ErrorSpec(403, 6, "Use a token that is allowed to do this."),
    ErrorCode.UNREACHABLE: ErrorSpec(
        503, 7, "Check the address and that the other side runs: `flops status`, `NodeEngine status`."
    ),
    ErrorCode.TIMEOUT: ErrorSpec(504, 8, "Try again; if it stays, look at the logs of the other side."),
    ErrorCode.PORT_OCCUPIED: ErrorSpec(
        409, 9, "Stop the program that holds the port, or choose another port."
    ),
    ErrorCode.DISK_FULL: ErrorSpec(507, 10, "Free space on the disk named above, then try again."),
    ErrorCode.PYTHON_UNSUPPORTED: ErrorSpec(
        500, 11, "Install Python 3.11 or newer with its venv module (Debian: python3-venv)."
    ),
    ErrorCode.ALREADY_RUNNING: ErrorSpec(409, 12, "Stop the running one first, or use another --home."),
    ErrorCode.NOT_RUNNING: ErrorSpec(409, 13, "Start it first."),
    ErrorCode.FILE_UNREADABLE: ErrorSpec(400, 14, "Check the path and its permissions."),
    ErrorCode.CONFIG_CORRUPT: ErrorSpec(
        500,
        15,
        "Repair the file, or write the defaults with `NodeEngine config default`; nothing was changed.",
    ),
    ErrorCode.CONFIG_INVALID: ErrorSpec(400, 16, "Give one of the accepted values; nothing was changed."),
    ErrorCode.UNHEALTHY: ErrorSpec(503, 17, "Do what stands beside each problem; docs/doctor.md has more."),
    ErrorCode.SLA_INVALID: ErrorSpec(
        422, 20, "Correct the named keys; docs/sla.md lists every key with its range."
    ),
    ErrorCode.SLA_UNREADABLE: ErrorSpec(400, 21, "Give the path of a JSON file; docs/sla.md has examples."),
    ErrorCode.PROJECT_NOT_FOUND: ErrorSpec(404, 22, "`flops project list` shows the projects that exist."),
    ErrorCode.PLACEMENT_IMPOSSIBLE: ErrorSpec(
        409,
        23,
        "Prepare the nodes named above, or ask for less; `flops node list` shows addons and data tags.",
    ),
    ErrorCode.REPO_UNREACHABLE: ErrorSpec(
        422, 30, "Check ml_repo_url with `git ls-remote URL` on the machine of the manager."
    ),
    ErrorCode.REPO_REF_NOT_FOUND: ErrorSpec(
        422, 31, "Name an existing branch, tag or commit in ml_repo_ref."
    ),
    ErrorCode.REPO_CONTRACT_BROKEN: ErrorSpec(
        422, 32, "docs/ml-repository.md shows what a repository must hold; examples/mnist_sklearn is one."
    ),
    ErrorCode.DEPENDENCIES_INVALID: ErrorSpec(
        422,
        33,
        "Correct the dependency file: conda.yml (with a pip section), requirements.txt or pyproject.toml.",
    ),
    ErrorCode.DEPENDENCIES_UNRESOLVABLE: ErrorSpec(
        422, 34, "Loosen or correct the requirements named above; nothing was installed."
    ),
    ErrorCode.ENVIRONMENT_BUILD_FAILED: ErrorSpec(
        502, 35, "See `flops project logs` for the builder's output; submitting again tries anew."
    ),
    ErrorCode.USER_CODE_FAILED: ErrorSpec(
        422, 40, "The traceback shows the line in your repository; mend it, commit, and submit again."
    ),
    ErrorCode.NO_MATCHING_DATA: ErrorSpec(
        409, 41, "Send data with this tag to the node: `flops data push FILE --tag TAG`."
    ),
    ErrorCode.TOO_FEW_LEARNERS: ErrorSpec(
        409,
        42,
        "Look at `flops node list` and the learners' logs; lower min_fit_clients to train with fewer.",
    ),
    ErrorCode.ROUND_FAILED: ErrorSpec(502, 43, "`flops project show` says what each learner answered."),
    ErrorCode.AGGREGATION_FAILED: ErrorSpec(
        422, 44, "Every learner must return the same number of arrays with the same shapes, without NaN."
    ),
    ErrorCode.STRATEGY_INVALID: ErrorSpec(422, 45, "docs/sla.md lists the strategies and their parameters."),
    ErrorCode.MODEL_EXPORT_FAILED: ErrorSpec(
        422, 46, "get_model() must return a model of ml_model_flavor; see docs/ml-repository.md."
    ),
    ErrorCode.TRACKING_FAILED: ErrorSpec(502, 47, "Look at the MLflow server: `flops status`, and its log."),
    ErrorCode.NODE_NOT_FOUND: ErrorSpec(404, 50, "`flops node list` shows the nodes that have joined."),
    ErrorCode.NODE_LOST: ErrorSpec(503, 51, "Check the machine and `NodeEngine status` on it."),
    ErrorCode.CLUSTER_NOT_FOUND: ErrorSpec(
        404, 48, "`flops cluster list` shows the clusters that have joined."
    ),
    ErrorCode.ADDON_UNKNOWN: ErrorSpec(
        400, 52, "The addons are FLOps-learner (FLOps) and imageBuilder (image-builder)."
    ),
    ErrorCode.ADDON_UNHEALTHY: ErrorSpec(
        503, 53, "`NodeEngine status` says what is wrong; it is retried by itself."
    ),
    ErrorCode.SERVICE_NOT_FOUND: ErrorSpec(404, 54, "`flops project show` lists the services of a project."),
    ErrorCode.SERVICE_FAILED: ErrorSpec(502, 55, "`flops project logs --service …` shows its output."),
    ErrorCode.OUT_OF_MEMORY: ErrorSpec(
        507, 56, "Raise resource_constraints.memory (MB), or use less data at once."
    ),
    ErrorCode.OUT_OF_STORAGE: ErrorSpec(
        507, 78, "Raise resource_constraints.storage (MB), or have the code write less."
    ),
    ErrorCode.JOIN_REFUSED: ErrorSpec(
        403, 57, "Get a new token with `flops node invite` on the machine of the control plane."
    ),
    ErrorCode.CERTIFICATE_REFUSED: ErrorSpec(
        403, 58, "Join anew: `flops node invite` there, `NodeEngine --token TOKEN -d` here."
    ),
    ErrorCode.ENCRYPTION_MISMATCH: ErrorSpec(
        400, 59, "Both sides encrypt, or both are told not to; docs/security.md says how each is told."
    ),
    ErrorCode.TAG_INVALID: ErrorSpec(
        400, 60, "A tag is 1 to 64 letters, digits, '-' or '_', and begins with a letter or digit."
    ),
    ErrorCode.NAME_INVALID: ErrorSpec(400, 61, "Name uploads '<tag>.<id>.parquet', without any path."),
    ErrorCode.TAG_NOT_FOUND: ErrorSpec(404, 62, "`flops data list` shows the tags of a node."),
    ErrorCode.FRAGMENT_NOT_FOUND: ErrorSpec(
        404, 63, "`flops data describe TAG` lists the fragments of a tag."
    ),
    ErrorCode.FRAGMENT_DAMAGED: ErrorSpec(
        500, 74, "It was put aside and hides nothing else; send the data again, and check the disk."
    ),
    ErrorCode.SCHEMA_MISMATCH: ErrorSpec(
        409, 64, "Send columns as the tag has them, use another tag, or drop the tag first."
    ),
    ErrorCode.UPLOAD_INCOMPLETE: ErrorSpec(400, 65, "Nothing was stored. Send the upload again."),
    ErrorCode.DATA_EMPTY: ErrorSpec(400, 66, "Send at least one row."),
    ErrorCode.DATA_FORMAT_UNKNOWN: ErrorSpec(
        400, 67, "Give a Parquet, CSV or NPZ file, or a folder of images with one sub-folder per label."
    ),
    ErrorCode.QUOTA_EXCEEDED: ErrorSpec(507, 68, "Drop old fragments, or raise the quota of the tag."),
    ErrorCode.DATASET_UNKNOWN: ErrorSpec(
        422,
        69,
        "Name a file, a shipped dataset (mnist), or a Hugging Face dataset while its hub can be reached.",
    ),
    ErrorCode.PARTITIONING_INVALID: ErrorSpec(
        422, 70, "docs/sla.md lists the partitioners and their parameters."
    ),
    ErrorCode.INPUT_INVALID: ErrorSpec(
        400,
        71,
        "Send JSON (dataframe_split, dataframe_records, instances, inputs) or CSV; see docs/inference.md.",
    ),
    ErrorCode.MODEL_NOT_FOUND: ErrorSpec(404, 72, "`flops model list` shows the models that exist."),
    ErrorCode.MODEL_UNLOADABLE: ErrorSpec(500, 73, "Look at the log of the inference service."),
    ErrorCode.NOT_DEPLOYED: ErrorSpec(
        409, 75, "`flops model deploy MODEL` deploys it; `flops model list` shows what is deployed where."
    ),
    ErrorCode.ROLLBACK_IMPOSSIBLE: ErrorSpec(
        409,
        76,
        "`flops model show` lists what was deployed; `flops model deploy --version` takes any version.",
    ),
    ErrorCode.MODEL_DEPLOYED: ErrorSpec(
        409, 77, "Deploy another version, or `flops model undeploy MODEL`; then delete the project."
    ),
    ErrorCode.IMAGE_NAME_INVALID: ErrorSpec(
        400, 80, "Name images as HOST/NAME:TAG, such as localhost:5000/flops/learner:v1."
    ),
    ErrorCode.IMAGE_NOT_FOUND: ErrorSpec(
        404, 81, "Look at the name, the tag and the platform; `docs/images.md` says what FLOps pushes where."
    ),
    ErrorCode.IMAGE_DAMAGED: ErrorSpec(
        502, 82, "Push the image again; if it stays, look at the disk of the registry."
    ),
    ErrorCode.IMAGE_BUILD_FAILED: ErrorSpec(
        502, 83, "See `flops project logs` for the builder's output; submitting again tries anew."
    ),
    ErrorCode.DOCKERFILE_FAILED: ErrorSpec(
        422,
        86,
        "Correct the Dockerfile; `flops project logs ID --service builder` shows all that its steps wrote.",
    ),
    ErrorCode.REGISTRY_UNREACHABLE: ErrorSpec(
        503, 84, "Check that the registry runs, and its address; what was sent is kept, the next try goes on."
    ),
    ErrorCode.REGISTRY_REFUSED: ErrorSpec(
        502, 85, "Check the credentials for this registry, what they allow, and its free space."
    ),
}


class FlopsError(Exception):
    """An error with a code, a sentence that says what happened and where, and a hint.

    Args:
        code: which error it is.
        message: one sentence: what happened, and where (file, key, node, address).
        hint: what to do; the catalogue's hint when not given.
        details: machine-readable facts (JSON types only), such as ``traceback``, ``node``, ``round``.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        hint: str | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint if hint is not None else CATALOGUE[code].hint
        self.details: dict[str, Any] = dict(details or {})

    @property
    def spec(self) -> ErrorSpec:
        """The catalogue's entry of this error's code."""
        return CATALOGUE[self.code]

    def __str__(self) -> str:
        return f"{self.message} [{self.code.value}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.code, self.message, self.hint, self.details))

    def to_dict(self) -> dict[str, Any]:
        """The one shape in which errors cross every boundary (REST, events, Flight, CLI)."""
        return {"code": self.code.value, "message": self.message, "hint": self.hint, "details": self.details}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> FlopsError:
        """Rebuild an error from `to_dict`; a code this version does not know becomes ``internal``."""
        try:
            code = ErrorCode(str(raw.get("code", "")))
        except ValueError:
            code = ErrorCode.INTERNAL
        return cls(
            code,
            str(raw.get("message", "unknown error")),
            hint=str(raw["hint"]) if raw.get("hint") is not None else None,
            details=raw.get("details") or {},
        )


def _rebuild(code: ErrorCode, message: str, hint: str, details: dict[str, Any]) -> FlopsError:
    return FlopsError(code, message, hint=hint, details=details)
