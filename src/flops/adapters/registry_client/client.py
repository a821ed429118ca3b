"""Moves images to and from registries, by the OCI distribution specification over HTTP.

Written by hand: the libraries there are neither verify what they fetch nor go on where they broke off.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import ssl
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import httpx

from flops.adapters.registry_client.auth import DockerCredentials, RegistryAuth
from flops.adapters.registry_client.link import Link
from flops.adapters.registry_client.transfers import pull_blob, push_blob
from flops.core.ids import Digest
from flops.core.image_reference import ImageReference
from flops.core.images import (
    MANIFEST_TYPES,
    MAX_MANIFEST_BYTES,
    Descriptor,
    Index,
    Manifest,
    read_manifest,
)
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs, Report

_SILENCE_S = 60.0  # without a single byte
_CONNECT_S = 10.0
_FIRST_PAUSE_S = 0.5
_LOCAL = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:\d+)?")


class OciRegistry:
    """Implements `flops.image_ports.Registry`, for any number of registries.

    Args:
        credentials: who we are to which registry.
        tls: how to encrypt; None for the default.
        own_tls: likewise, for some hosts, with their ports, that have an authority of their own.
        plain_http: hosts, with their ports, that are spoken to in the clear; this machine always is.
        first_pause_s: before something is tried again; later pauses are longer.
    """

    def __init__(
        self,
        credentials: DockerCredentials | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        own_tls: Mapping[str, ssl.SSLContext] = MappingProxyType({}),
        plain_http: frozenset[str] = frozenset(),
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._credentials = credentials or DockerCredentials({})
        self._verify: ssl.SSLContext | bool = tls if tls is not None else True
        self._own_tls = own_tls
        self._plain_http = plain_http
        self._first_pause_s = first_pause_s

    def push(self, reference: ImageReference, image: Descriptor, blobs: ImageBlobs, report: Report) -> int:
        """Send an image and name it; see `flops.image_ports.Registry.push`.

        Raises:
            FlopsError: ``registry_unreachable``, ``registry_refused``, ``image_damaged``.
        """
        with self._connect(reference) as link:
            sent = _push_image(link, image, blobs, report, reference.version)
        report(f"{reference} was pushed; {sent / 1e6:.1f} MB were sent.")
        return sent

    def pull(
        self, reference: ImageReference, blobs: ImageBlobs, report: Report, platform: str | None = None
    ) -> Descriptor:
        """Bring an image here, whole and verified; see `flops.image_ports.Registry.pull`.

        Raises:
            FlopsError: ``image_not_found``, ``image_damaged``, ``registry_unreachable``,
                ``registry_refused``, ``disk_full``.
        """
        with self._connect(reference) as link:
            found, manifest = _pull_manifest(link, reference.version, blobs)
            if isinstance(manifest, Index) and platform is not None:
                chosen = manifest.choose(platform)
                if chosen is None:
                    raise FlopsError(
                        ErrorCode.IMAGE_NOT_FOUND,
                        f"{reference} is there for {', '.join(m.platform for m in manifest.manifests)}, "
                        f"not for {platform}.",
                    )
                found, manifest = _pull_manifest(link, f"sha256:{chosen.digest}", blobs)
            _pull_parts(link, manifest, blobs, report)
        return found

    def find(self, reference: ImageReference) -> Descriptor:
        """What a name leads to.

        Raises:
            FlopsError: ``image_not_found``, ``registry_unreachable``, ``registry_refused``.
        """
        with self._connect(reference) as link:
            return _fetch_manifest(link, reference.version)[0]

    def tags(self, reference: ImageReference) -> list[str]:
        """All tags of an image's name, sorted; none for a name that is not known.

        Raises:
            FlopsError: ``registry_unreachable``, ``registry_refused``.
        """
        found: list[str] = []
        with self._connect(reference) as link:
            url: str | None = f"{link.base}/tags/list"
            while url is not None:
                response = link.ask("GET", url, accept={200, 404})
                if response.status_code == httpx.codes.NOT_FOUND:
                    break
                found += response.json().get("tags") or []
                following = response.links.get("next", {}).get("url")
                url = str(response.url.join(following)) if following else None
        return sorted(found)

    def delete(self, reference: ImageReference) -> None:
        """Remove an image by its digest, with all tags that lead to it; an unknown one is no error.

        Raises:
            FlopsError: ``registry_unreachable``; ``registry_refused`` when the registry does not delete.
        """
        with self._connect(reference) as link:
            try:
                digest = _fetch_manifest(link, reference.version)[0].digest
            except FlopsError as exc:
                if exc.code is ErrorCode.IMAGE_NOT_FOUND:
                    return
                raise
            link.ask("DELETE", f"{link.base}/manifests/sha256:{digest}", accept={200, 202, 204, 404})

    @contextlib.contextmanager
    def _connect(self, reference: ImageReference) -> Iterator[Link]:
        host = reference.host
        is_plain = host not in self._own_tls and (_LOCAL.fullmatch(host) or host in self._plain_http)
        scheme = "http" if is_plain else "https"
        origin = httpx.URL(f"{scheme}://{host}")
        auth = RegistryAuth(origin, self._credentials.find(host, reference.name))
        # Which registry is meant is said in full; the environment's proxies and .netrc have no part in it.
        with httpx.Client(
            auth=auth,
            verify=self._own_tls.get(host, self._verify),
            trust_env=False,
            follow_redirects=True,
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
            headers={"User-Agent": "flops"},
        ) as client:
            yield Link(client, origin, reference, self._first_pause_s)


def _push_image(link: Link, image: Descriptor, blobs: ImageBlobs, report: Report, version: str) -> int:
    """Send what an image is made of, then its manifest; returns the bytes that were sent."""
    try:
        data = blobs.get(image.digest)
    except FlopsError as exc:
        raise FlopsError(
            ErrorCode.IMAGE_DAMAGED,
            f"{link.reference} cannot be pushed: {exc.message}",
            hint="Build it again.",
        ) from exc
    manifest = read_manifest(data, image.media_type)
    sent = 0
    if isinstance(manifest, Index):
        for found in manifest.manifests:
            sent += _push_image(link, found, blobs, report, f"sha256:{found.digest}")
    else:
        for part in manifest.blobs:
            sent += push_blob(link, part, blobs, report)
    url = f"{link.base}/manifests/{version}"
    link.ask("PUT", url, accept={200, 201}, headers={"Content-Type": image.media_type}, content=data)
    return sent + len(data)


def _pull_parts(link: Link, manifest: Manifest | Index, blobs: ImageBlobs, report: Report) -> None:
    if isinstance(manifest, Index):
        for found in manifest.manifests:
            _pull_parts(link, _pull_manifest(link, f"sha256:{found.digest}", blobs)[1], blobs, report)
        return
    for part in manifest.blobs:
        pull_blob(link, part, blobs, report)


def _pull_manifest(link: Link, version: str, blobs: ImageBlobs) -> tuple[Descriptor, Manifest | Index]:
    found, data = _fetch_manifest(link, version)
    manifest = read_manifest(data, found.media_type)
    blobs.put(data)
    return found, manifest


def _fetch_manifest(link: Link, version: str) -> tuple[Descriptor, bytes]:
    """A manifest's descriptor and its bytes, verified."""
    url = f"{link.base}/manifests/{version}"
    response = link.ask("GET", url, accept={200}, headers={"Accept": ", ".join(MANIFEST_TYPES)})
    data = response.content
    digest = Digest(hashlib.sha256(data).hexdigest())
    expected = version if ":" in version else response.headers.get("docker-content-digest", "")
    if len(data) > MAX_MANIFEST_BYTES or (expected and expected != f"sha256:{digest}"):
        raise FlopsError(
            ErrorCode.IMAGE_DAMAGED,
            f"The manifest of {link.reference} has the digest sha256:{digest} instead of {expected}.",
        )
    media_type = response.headers.get("content-type", "").partition(";")[0].strip()
    return Descriptor(media_type=media_type, digest=digest, size=len(data)), data
