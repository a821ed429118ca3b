"""What each kind of service may dial, where it may listen, and which ones confine themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flops.actor import ActorContext, EventLog
from flops.core.cluster import ServiceKind
from flops.errors import ErrorCode, FlopsError
from flops.node.service_reach import service_reach

LEARNER: dict[str, Any] = {"aggregator": "10.0.0.1:4242"}


def a_context(config: dict[str, Any], **changes: Any) -> ActorContext:
    return ActorContext("s1", "p1", "pi", "/work", data_address="[fd00::1]:11027", config=config, **changes)


@pytest.mark.parametrize(
    ("kind", "config", "dials", "listens"),
    [
        (ServiceKind.LEARNER, LEARNER, (4242, 11027), ()),
        (ServiceKind.LEARNER, {"aggregator": "nonsense"}, (11027,), ()),
        (ServiceKind.INFERENCE, {"port": 8080}, (), (8080,)),
        (ServiceKind.INFERENCE, {}, (), ()),
        (ServiceKind.AGGREGATOR, {}, None, ()),
        (ServiceKind.BUILDER, {}, None, ()),
    ],
)
@pytest.mark.parametrize("image", ["", "localhost:5000/flops/any"])
def test_users_code_is_held_to_the_ports_of_its_service(
    kind: ServiceKind,
    config: dict[str, Any],
    dials: tuple[int, ...] | None,
    listens: tuple[int, ...],
    image: str,
) -> None:
    reach = service_reach(kind, a_context(config), {}, image)
    assert (reach.dials, reach.listens, reach.image) == (dials, listens, image)
    assert bool(reach.readable) is not bool(image)


AGGREGATOR = {"tracking_uri": "http://10.0.0.9:7027", "parent": {"address": "[fd00::2]:4000"}}


@pytest.mark.parametrize(
    ("blobs_url", "config", "dials"),
    [
        ("https://10.0.0.9:10100/api/blobs", AGGREGATOR, (10100, 7027, 4000)),
        ("https://10.0.0.9/api/blobs", {"tracking_uri": "/mlflow", "parent": None}, (443,)),
        ("https://cluster.example.org:10100/api/blobs", AGGREGATOR, None),
        ("https://10.0.0.9:10100/api/blobs", {"tracking_uri": "http://mlflow:80"}, None),
    ],
)
def test_an_aggregator_in_an_image_is_held_unless_names_are_to_be_looked_up(
    tmp_path: Path, blobs_url: str, config: dict[str, Any], dials: tuple[int, ...] | None
) -> None:
    context = ActorContext("s1", "p1", "pi", str(tmp_path), blobs_url=blobs_url, config=config)
    assert service_reach(ServiceKind.AGGREGATOR, context, {}).dials is None
    assert service_reach(ServiceKind.AGGREGATOR, context, {}, "any").dials == dials
    EventLog(tmp_path).tell("listening", address="10.0.0.1:4242")
    held = service_reach(ServiceKind.AGGREGATOR, context, {}, "any")
    assert held.listens == (() if dials is None else (4242,))


def test_an_operator_can_open_the_network() -> None:
    context = a_context(LEARNER, has_open_network=True)
    assert service_reach(ServiceKind.LEARNER, context, {}).dials is None


MAKES_IMAGES = {"images": {"project_id": "p1"}}


@pytest.mark.parametrize("kind", list(ServiceKind))
@pytest.mark.parametrize("config", [{}, {"images": None}, MAKES_IMAGES])
def test_only_builders_of_images_begin_unconfined(kind: ServiceKind, config: dict[str, Any]) -> None:
    reach = service_reach(kind, a_context(config), {})
    assert reach.confines_itself is (kind is ServiceKind.BUILDER and config is MAKES_IMAGES)


def test_learners_read_the_files_of_their_tags_and_of_no_others() -> None:
    context = a_context({**LEARNER, "data_tags": ["a", "b"]}, data_dir="/node/dataserver/tags")
    reached = {kind: service_reach(kind, context, {}).readable for kind in ServiceKind}
    data = {kind: [path for path in found if "dataserver" in path] for kind, found in reached.items()}
    assert data.pop(ServiceKind.LEARNER) == ["/node/dataserver/tags/a", "/node/dataserver/tags/b"]
    assert not any(data.values())


def test_a_tag_that_is_a_path_leads_nowhere() -> None:
    context = a_context({**LEARNER, "data_tags": ["../../token"]}, data_dir="/node/dataserver/tags")
    with pytest.raises(FlopsError) as caught:
        service_reach(ServiceKind.LEARNER, context, {})
    assert caught.value.code is ErrorCode.TAG_INVALID
