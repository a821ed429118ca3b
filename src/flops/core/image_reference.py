"""Names of images: ``host/name:tag@sha256:digest``, read and written."""

from __future__ import annotations

import re

from flops.core.ids import Digest
from flops.core.model import Value
from flops.errors import ErrorCode, FlopsError

DEFAULT_TAG = "latest"
_LONGEST_NAME = 255

_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
NAME = re.compile(rf"{_PART}(?:/{_PART})*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
DIGEST = re.compile(r"sha256:(?P<hex>[0-9a-f]{64})")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class ImageReference(Value):
    """Where an image is: the registry's host, the image's name in it, and which one of that name."""

    host: str  # with the port, if any
    name: str
    tag: str = ""
    digest: Digest | None = None  # of the manifest or index

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@sha256:{self.digest}" if self.digest else ""
        return f"{self.host}/{self.name}{tag}{digest}"

    @property
    def version(self) -> str:
        """What a registry finds the image by: its digest if known, else its tag."""
        return f"sha256:{self.digest}" if self.digest else self.tag or DEFAULT_TAG

    def at(self, digest: Digest) -> ImageReference:
        """The same image, pinned: whoever pulls it gets these bytes or none."""
        return self.model_copy(update={"digest": digest})


def parse_reference(text: str) -> ImageReference:
    """Read an image's name; its host must be said, no registry is taken for granted.

    Raises:
        FlopsError: ``image_name_invalid``.
    """
    rest, _, digest_text = text.partition("@")
    digest = DIGEST.fullmatch(digest_text)
    host, slash, path = rest.partition("/")
    name, _, tag = path.partition(":")
    problem = ""
    if not slash or not is_host(host):
        problem = "it does not begin with a registry's host, such as localhost:5000/"
    elif not is_name(name):
        problem = f"{name!r} is no image name: lower-case letters, digits, and single '.', '_' or '-' between"
    elif ":" in path and not TAG.fullmatch(tag):
        problem = f"{tag!r} is no tag: 1 to 128 letters, digits, '_', '.' or '-'"
    elif "@" in text and digest is None:
        problem = f"{digest_text!r} is no digest: sha256: and 64 lower-case hex characters"
    if problem:
        raise FlopsError(ErrorCode.IMAGE_NAME_INVALID, f"{text[:300]!r} names no image: {problem}.")
    return ImageReference(host=host, name=name, tag=tag, digest=Digest(digest["hex"]) if digest else None)


def is_host(text: str) -> bool:
    """Whether a reference's first part is a host: one that could not be the first part of a name."""
    return bool(_HOST.fullmatch(text)) and (text == "localhost" or bool(re.search(r"[.:]", text)))


def is_name(text: str) -> bool:
    """Whether a registry takes this as the name of an image."""
    return len(text) <= _LONGEST_NAME and bool(NAME.fullmatch(text))
