"""What every `flops.ports.Host` does."""

from __future__ import annotations

import ipaddress

import pytest

from flops.ports import Host


class HostContract:
    """Subclass it, and provide the fixture `host`."""

    @pytest.fixture
    def host(self) -> Host:
        """A host."""
        raise NotImplementedError

    def test_facts_are_complete(self, host: Host) -> None:
        facts = host.facts()
        assert facts.hostname
        assert facts.architecture
        assert facts.operating_system
        assert facts.python_version
        assert facts.flops_version
        assert facts.cpu_cores >= 1
        assert facts.memory_mb > 0
        assert facts.disk_free_mb > 0
        assert facts.runtimes == ("process",)
        ipaddress.ip_address(facts.address)

    def test_the_load_is_in_percent(self, host: Host) -> None:
        load = host.load()
        assert 0 <= load.cpu_percent <= 100
        assert 0 < load.memory_percent <= 100
        assert load.disk_free_mb > 0
