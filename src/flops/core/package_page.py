"""Pages of a package index (PEP 503): a package's files, each with its address and SHA-256."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

from flops.core.ids import Digest
from flops.core.model import Value

_HASH = re.compile(r"sha256=(?P<hex>[0-9a-f]{64})")
_LOCKED = re.compile(r"--hash=sha256:(?P<hex>[0-9a-f]{64})")
_SEPARATORS = re.compile(r"[-_.]+")


class PackageFile(Value):
    """A file of a package.

    Args:
        name: such as ``numpy-2.1.0-cp311-cp311-manylinux_2_28_x86_64.whl``.
        url: where the index has it.
        sha256: of its bytes.
        requires_python: the versions of Python it is for; "" for not said.
    """

    name: str
    url: str
    sha256: Digest
    requires_python: str = ""


def read_page(page: str, url: str) -> tuple[PackageFile, ...]:
    """The files on a page; those without a SHA-256 are left out, as nothing could be compared.

    Args:
        page: HTML.
        url: of the page, which its links are relative to.
    """
    reader = _Reader(url)
    reader.feed(page)
    return tuple(reader.files)


class _Reader(HTMLParser):
    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.files: list[PackageFile] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        href, fragment = urldefrag(urljoin(self._url, given.get("href") or ""))
        found = _HASH.search(fragment)
        name = unquote(urlsplit(href).path.rpartition("/")[2])
        if tag == "a" and found is not None and name:
            needed = given.get("data-requires-python") or ""
            self.files.append(
                PackageFile(name=name, url=href, sha256=Digest(found["hex"]), requires_python=needed)
            )


def write_page(files: Iterable[PackageFile]) -> str:
    """A page of files that are served at ``../../files/<SHA-256>/<name>``."""
    lines = []
    for file in files:
        needed = (
            f' data-requires-python="{html.escape(file.requires_python)}"' if file.requires_python else ""
        )
        address = f"../../files/{file.sha256}/{quote(file.name)}#sha256={file.sha256}"
        lines.append(f'<a href="{address}"{needed}>{html.escape(file.name)}</a><br>\n')
    return f"<!DOCTYPE html>\n<html><body>\n{''.join(lines)}</body></html>\n"


def package_of(file: str) -> str:
    """The normalised name of the package that a file belongs to."""
    stem = file.removesuffix(".tar.gz").removesuffix(".zip")
    name = file.split("-")[0] if file.endswith(".whl") else stem.rpartition("-")[0]
    return normal_name(name)


def normal_name(name: str) -> str:
    """A package's name as indexes have it (PEP 503)."""
    return _SEPARATORS.sub("-", name).lower()


def locked_files(lock: str) -> frozenset[Digest]:
    """The SHA-256 of every file that a lock allows."""
    return frozenset(Digest(found["hex"]) for found in _LOCKED.finditer(lock))
