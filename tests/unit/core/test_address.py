from __future__ import annotations

import pytest

from flops.core.address import split_port, with_port


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.0.0.4", "10.0.0.4:10100"), ("edge.local", "edge.local:10100"), ("fd00::1", "[fd00::1]:10100")],
)
def test_host_and_port_are_joined_and_parted(host: str, address: str) -> None:
    assert with_port(host, 10_100) == address
    assert split_port(address) == (host, 10_100)


@pytest.mark.parametrize("address", ["", "edge.local", "edge.local:", "[fd00::1]", "edge.local:http"])
def test_what_has_no_port_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        split_port(address)
