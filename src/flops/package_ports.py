"""What is needed from the outside world to share packages on a site, as protocols; beside `flops.ports`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from flops.core.package_page import PackageFile


class PackageIndex(Protocol):
    """The index that packages come from."""

    def files(self, name: str) -> tuple[PackageFile, ...]:
        """The files of a package, by its normalised name.

        Raises:
            FlopsError: ``unreachable``; ``not_found`` when the index has no such package.
        """
        ...

    def chunks(self, file: PackageFile) -> Iterator[bytes]:
        """The bytes of a file, piece by piece; not verified.

        Raises:
            FlopsError: ``unreachable``; ``not_found``. Also in the middle.
        """
        ...


class SitePackages(Protocol):
    """Packages that somebody near has, so that each is fetched once for all nodes of a site."""

    def serving(self, lock: str) -> AbstractContextManager[str]:
        """URL of an index that has the files of a lock, until the end of the block.

        It is "" when nobody serves one. Never raises.
        """
        ...
