"""Names of images and their parts are read as they were written, for all there can be."""

from __future__ import annotations

import json
import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flops.core.ids import Digest
from flops.core.image_reference import ImageReference, parse_reference
from flops.core.images import (
    Descriptor,
    HealthCheck,
    ImageRun,
    Index,
    Layer,
    Manifest,
    config_bytes,
    image_labels,
    index_bytes,
    manifest_bytes,
    read_config,
    read_manifest,
)
from flops.core.platforms import Platform
from flops.errors import ErrorCode, FlopsError

digests = st.text("0123456789abcdef", min_size=64, max_size=64).map(Digest)
words = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)
hosts = st.one_of(
    st.just("localhost"),
    st.builds("{}:{}".format, words, st.integers(0, 65_535)),
    st.builds("{}.{}".format, words, words),
    st.builds("[::1]:{}".format, st.integers(0, 65_535)),
)
names = st.lists(
    st.builds(
        "".join, st.tuples(words, st.sampled_from([".", "_", "__", "-", "---"]), words) | st.tuples(words)
    ),
    min_size=1,
    max_size=4,
).map("/".join)
tags = st.just("") | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", fullmatch=True)
references = st.builds(ImageReference, host=hosts, name=names, tag=tags, digest=st.none() | digests)
platforms = st.sampled_from(["", *(platform.value for platform in Platform)])
descriptors = st.builds(
    Descriptor,
    media_type=st.sampled_from(["application/vnd.oci.image.layer.v1.tar+gzip", "text/plain"]),
    digest=digests,
    size=st.integers(0, 2**40),
    platform=platforms,
    annotations=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2),
)
layers = st.builds(Layer, blob=descriptors, diff_id=digests, what=st.text(max_size=20))
variables = st.dictionaries(words, st.text(max_size=20), max_size=3)


def refusal_of(read: Callable[[], object]) -> ErrorCode | None:
    try:
        read()
    except FlopsError as error:
        return error.code
    return None


@given(references)
def test_a_name_is_read_as_it_was_written(reference: ImageReference) -> None:
    assert parse_reference(str(reference)) == reference


@given(st.text(max_size=80) | st.from_regex(r"[a-z./:@_-]{0,60}", fullmatch=True))
def test_a_text_is_a_name_or_refused(text: str) -> None:
    if refusal_of(lambda: parse_reference(text)) is None:
        assert str(parse_reference(text)) == text
    else:
        assert refusal_of(lambda: parse_reference(text)) is ErrorCode.IMAGE_NAME_INVALID


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "host"),
        ("learner", "host"),
        ("flops/learner:v1", "host"),
        ("localhost:5000/Learner", "image name"),
        ("localhost:5000/a/../b", "image name"),
        ("localhost:5000/learner:", "tag"),
        ("localhost:5000/learner:-v", "tag"),
        ("localhost:5000/learner@", "digest"),
        ("localhost:5000/learner@sha256:12", "digest"),
        ("localhost:5000/" + "a" * 256, "image name"),
    ],
)
def test_what_is_wrong_with_a_name_is_said(text: str, problem: str) -> None:
    with pytest.raises(FlopsError) as caught:
        parse_reference(text)
    assert caught.value.code is ErrorCode.IMAGE_NAME_INVALID
    assert problem in caught.value.message


def test_a_pinned_name_leads_to_its_digest() -> None:
    reference = parse_reference("localhost/flops/learner")
    assert reference.version == "latest"
    assert reference.at(Digest("0" * 64)).version == "sha256:" + "0" * 64


@given(descriptors, st.lists(descriptors, max_size=4))
def test_a_manifest_is_read_as_it_was_written(config: Descriptor, parts: list[Descriptor]) -> None:
    data = manifest_bytes(config, parts)
    assert read_manifest(data) == Manifest(config=config, layers=tuple(parts))


@given(st.lists(descriptors, max_size=4, unique_by=lambda found: found.digest))
def test_an_index_is_read_as_it_was_written_in_whatever_order(manifests: list[Descriptor]) -> None:
    data = index_bytes(manifests)
    index = read_manifest(data)
    assert isinstance(index, Index)
    assert data == index_bytes(manifests[::-1])
    assert len(index.manifests) == len(manifests)
    assert all(found in index.manifests for found in manifests)
    for found in manifests:
        chosen = index.choose(found.platform)
        assert chosen is not None
        assert chosen.platform == found.platform


@given(st.sampled_from(Platform), st.lists(layers, max_size=4), variables, variables)
def test_a_config_says_the_same_whatever_the_order_of_its_parts(
    platform: Platform, parts: list[Layer], env: dict[str, str], labels: dict[str, str]
) -> None:
    run = ImageRun(env=env, labels=labels, health=HealthCheck(command=("true",)), ports=(8080,))
    turned = run.model_copy(
        update={
            "env": dict(reversed(list(env.items()))),
            "labels": dict(reversed(list(labels.items()))),
        }
    )
    data = config_bytes(platform, parts, run)
    assert data == config_bytes(platform, parts, turned)
    assert read_config(data) == (tuple(layer.diff_id for layer in parts), env, labels)
    raw = json.loads(data)
    assert f"{raw['os']}/{raw['architecture']}" == platform
    assert raw["config"]["User"] not in {"", "0", "root"}


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda value: json.dumps(value).encode(),
        st.recursive(
            st.none() | st.integers() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["manifests", "config", "layers", "digest", "size", "mediaType"]), inner
                )
            ),
        ),
    )
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    assert refusal_of(lambda: read_manifest(data)) in {None, ErrorCode.IMAGE_DAMAGED}
    assert refusal_of(lambda: read_config(data)) in {None, ErrorCode.IMAGE_DAMAGED}


def test_docker_names_of_layers_become_those_of_the_oci() -> None:
    digest = f"sha256:{'0' * 64}"
    layer = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip", "digest": digest, "size": 1}
    config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest, "size": 1}
    manifest = read_manifest(json.dumps({"config": config, "layers": [layer]}).encode())
    assert isinstance(manifest, Manifest)
    assert manifest.layers[0].media_type == "application/vnd.oci.image.layer.v1.tar+gzip"


def test_labels_say_what_is_known() -> None:
    labels = image_labels(
        title="Model", project="p1", run="r1", round_number=0, metrics={"accuracy": 0.5}, revision="abc"
    )
    assert labels == {
        "org.flops.metric.accuracy": "0.5",
        "org.flops.project": "p1",
        "org.flops.round": "0",
        "org.flops.run": "r1",
        "org.opencontainers.image.revision": "abc",
        "org.opencontainers.image.title": "Model",
    }
