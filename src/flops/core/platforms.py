"""What machines are made for: the platforms of nodes, images and SLAs."""

from __future__ import annotations

from enum import StrEnum

from flops.errors import ErrorCode, FlopsError


class Platform(StrEnum):
    """A platform, as SLAs name it."""

    AMD64 = "linux/amd64"
    ARM64 = "linux/arm64"

    @classmethod
    def of(cls, machine: str) -> Platform:
        """The platform of a machine, by what ``uname -m`` prints, or by OCI's name of it.

        Raises:
            FlopsError: ``config_invalid`` for another one.
        """
        found = next((p for p in cls if machine in {p.machine, p.architecture}), None)
        if found is None:
            raise FlopsError(ErrorCode.CONFIG_INVALID, f"No images are made for machines of {machine}.")
        return found

    @property
    def architecture(self) -> str:
        """As OCI, Docker and Debian name it."""
        return self.value.partition("/")[2]

    @property
    def machine(self) -> str:
        """As ``uname -m`` and names of wheels have it."""
        return {"amd64": "x86_64", "arm64": "aarch64"}[self.architecture]
