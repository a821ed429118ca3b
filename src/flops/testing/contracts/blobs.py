"""What every `flops.ports.BlobStreams` does, and every `flops.image_ports.ImageBlobs`."""

from __future__ import annotations

import hashlib

import pytest

from flops.core.ids import Digest
from flops.errors import ErrorCode, FlopsError
from flops.image_ports import ImageBlobs

ABSENT = Digest("0" * 64)


def digest_of(data: bytes) -> Digest:
    """The SHA-256 of bytes."""
    return Digest(hashlib.sha256(data).hexdigest())


class BlobsContract:
    """Subclass it, and provide the fixture `blobs`."""

    @pytest.fixture
    def blobs(self) -> ImageBlobs:
        raise NotImplementedError

    @pytest.mark.parametrize("data", [b"", b"a", b"\x00" * 3_000_000], ids=["empty", "small", "large"])
    def test_what_is_put_can_be_got(self, blobs: ImageBlobs, data: bytes) -> None:
        digest = blobs.put(data)
        assert digest == digest_of(data)
        assert blobs.has(digest)
        assert blobs.get(digest) == data
        assert blobs.size(digest) == len(data)
        assert blobs.is_intact(digest)
        assert b"".join(blobs.chunks(digest)) == data

    def test_the_same_bytes_again_change_nothing(self, blobs: ImageBlobs) -> None:
        assert blobs.put(b"data") == blobs.put(b"data")
        assert blobs.get(digest_of(b"data")) == b"data"

    @pytest.mark.parametrize("digest", [ABSENT, Digest(""), Digest("../../etc/passwd"), Digest("A" * 64)])
    def test_what_is_not_there_is_not_found(self, blobs: ImageBlobs, digest: Digest) -> None:
        assert not blobs.has(digest)
        assert not blobs.is_intact(digest)
        for read in (blobs.get, blobs.size, lambda d: list(blobs.chunks(d))):
            with pytest.raises(FlopsError) as caught:
                read(digest)
            assert caught.value.code is ErrorCode.NOT_FOUND
            assert digest in caught.value.message

    def test_an_upload_is_there_once_it_is_committed(self, blobs: ImageBlobs) -> None:
        digest = digest_of(b"onetwo")
        upload = blobs.upload()
        upload.write(b"one")
        upload.write(b"two")
        assert not blobs.has(digest)
        upload.commit(digest)
        upload.discard()
        assert blobs.get(digest) == b"onetwo"

    def test_an_upload_with_another_digest_is_refused(self, blobs: ImageBlobs) -> None:
        upload = blobs.upload()
        upload.write(b"not zero")
        with pytest.raises(FlopsError) as caught:
            upload.commit(ABSENT)
        upload.discard()
        assert caught.value.code is ErrorCode.UPLOAD_INCOMPLETE
        assert not blobs.has(ABSENT)
        assert not blobs.has(digest_of(b"not zero"))

    def test_a_discarded_upload_leaves_nothing(self, blobs: ImageBlobs) -> None:
        upload = blobs.upload()
        upload.write(b"data")
        upload.discard()
        upload.discard()
        assert not blobs.has(digest_of(b"data"))

    def test_two_uploads_of_the_same_bytes_both_succeed(self, blobs: ImageBlobs) -> None:
        first, second = blobs.upload(), blobs.upload()
        for upload in (first, second):
            upload.write(b"data")
        for upload in (first, second):
            upload.commit(digest_of(b"data"))
            upload.discard()
        assert blobs.get(digest_of(b"data")) == b"data"

    def test_a_part_of_the_bytes_can_be_read(self, blobs: ImageBlobs) -> None:
        data = bytes(range(256)) * 10_000
        digest = blobs.put(data)
        for start, stop in ((0, 0), (0, 1), (1_500_000, 1_500_001), (5, len(data)), (len(data), len(data))):
            assert b"".join(blobs.part(digest, start, stop)) == data[start:stop]
        with pytest.raises(FlopsError) as caught:
            list(blobs.part(ABSENT, 0, 1))
        assert caught.value.code is ErrorCode.NOT_FOUND

    def test_what_is_removed_is_gone_and_can_be_put_again(self, blobs: ImageBlobs) -> None:
        first, second = sorted([blobs.put(b"one"), blobs.put(b"two")])
        assert blobs.digests() == [first, second]
        blobs.remove(first)
        blobs.remove(first)
        blobs.remove(ABSENT)
        assert blobs.digests() == [second]
        assert not blobs.has(first)
        blobs.put(b"one")
        blobs.put(b"two")
        assert blobs.digests() == [first, second]
