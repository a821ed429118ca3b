"""Who may join a cluster that encrypts, and speak to it: real sockets, real certificates, played nodes."""

from __future__ import annotations

import functools
import hashlib
import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flops.adapters.file_blobs import FileBlobs
from flops.adapters.http_server import HttpServer, server_tls
from flops.adapters.node_identity import (
    certify_service,
    read_identity,
    renew_identity,
)
from flops.adapters.node_link import dial_cluster
from flops.core.cluster import (
    IMAGE_BUILDER_ADDON,
    LEARNER_ADDON,
    ServiceKind,
    ServiceSpec,
    ServiceState,
    ServiceStatus,
)
from flops.core.ids import NodeId, ServiceId
from flops.errors import ErrorCode, FlopsError
from flops.orchestrator.app import build_app
from flops.testing.safe_cluster import ADDONS, HOUR_S, LIFE_S, SafeCluster, hello, refused
from flops.testing.waiting import until
from flops.wire.cluster_tls import cluster_tls
from flops.wire.flight import DATA_SERVER, aggregator_name, data_server_name
from flops.wire.join import JoinToken
from flops.wire.node import Heartbeat, Refused, RemoveService, ServiceChanged, StartService, Welcome


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SafeCluster]:
    cluster = SafeCluster(tmp_path / "cluster")
    yield cluster
    cluster.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[SafeCluster]:
    other = SafeCluster(tmp_path / "other")
    yield other
    other.close()


def spec(service_id: str, node_id: str) -> ServiceSpec:
    return ServiceSpec(
        id=ServiceId(service_id), project_id="p", kind=ServiceKind.LEARNER, node_id=NodeId(node_id)
    )


# Joining


def test_a_node_joins_by_a_token_and_is_known_by_its_certificate(cluster: SafeCluster) -> None:
    identity = cluster.join("n1", addons=(LEARNER_ADDON,))
    assert (identity.node_id, identity.signer.split()[:2]) == ("n1", ["FLOps", "cluster"])
    with cluster.linked("n1", addons=(LEARNER_ADDON,)) as played:
        played.expect(Welcome)
        assert cluster.connected() == {"n1"}
    for file in (cluster.file_of("n1"), cluster.folder / "authority.pem", cluster.folder / "identity.pem"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_authority_stays_over_restarts_and_so_do_its_nodes(cluster: SafeCluster) -> None:
    cluster.join("n1")
    before = cluster.security.admission.authority_pem
    cluster.restart()
    assert cluster.security.admission.authority_pem == before
    with cluster.linked("n1") as played:
        played.expect(Welcome)


def test_a_token_lets_as_many_nodes_in_as_it_says(
    cluster: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    token = cluster.invite(nodes=2)
    cluster.join("n1", token)
    cluster.join("n2", token)
    error = refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n3", token))
    assert "used 2 times" in error.message
    assert "used 2 times" in caplog.text
    assert not cluster.file_of("n3").exists()


def test_a_token_is_of_no_use_after_its_time(cluster: SafeCluster) -> None:
    token = cluster.invite()
    cluster.clock.ahead_s = HOUR_S + 1
    assert "time is over" in refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n1", token)).message


def test_a_token_that_nobody_made_is_refused(cluster: SafeCluster, other: SafeCluster) -> None:
    forged = cluster.invite().model_copy(update={"secret": "guessed"})
    refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n1", forged))
    foreign = other.invite().model_copy(update={"fingerprint": forged.fingerprint})
    refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n1", foreign))


@pytest.mark.parametrize("cut", [0, 1, 8, 40, -1])
def test_half_a_token_is_refused_before_anything_is_asked(cut: int) -> None:
    text = JoinToken(cluster="c:1", fingerprint="0" * 64, id="i", secret="s").text()
    assert JoinToken.parse(f" {text}\n").text() == text
    refused(ErrorCode.JOIN_REFUSED, lambda: JoinToken.parse(text[:cut]))


def test_nothing_is_told_to_a_cluster_that_did_not_make_the_token(
    cluster: SafeCluster, other: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    token = other.invite()
    with caplog.at_level(logging.INFO):
        error = refused(ErrorCode.CERTIFICATE_REFUSED, lambda: cluster.join("n1", token))
    assert "nothing was sent" in error.message
    assert "/api/node/join" not in caplog.text


def test_a_token_says_what_its_nodes_may_switch_on(cluster: SafeCluster) -> None:
    token = cluster.invite(nodes=2, addons=(LEARNER_ADDON,))
    error = refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n1", token, addons=ADDONS))
    assert IMAGE_BUILDER_ADDON in error.message
    cluster.join("n1", token, addons=(LEARNER_ADDON,))
    assert cluster.refusal_of("n1", addons=ADDONS).code is ErrorCode.FORBIDDEN
    with cluster.linked("n1", addons=(LEARNER_ADDON,)) as played:
        played.expect(Welcome)
        played.link.send(Heartbeat(addons=hello("n1", ADDONS).addons))  # later is no way round it
        assert played.expect(Refused).error["code"] == ErrorCode.FORBIDDEN.value


def test_an_id_that_has_joined_is_not_taken_over_by_another_key(cluster: SafeCluster) -> None:
    cluster.join("n1")
    cluster.file_of("n1").unlink()
    error = refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n1"))
    assert "another key" in error.message
    assert "flops node remove n1" in error.hint


def test_a_node_that_was_killed_before_the_answer_asks_again_and_counts_once(cluster: SafeCluster) -> None:
    token = cluster.invite()
    first = cluster.join("n1", token)
    text = cluster.file_of("n1").read_text()
    key = text[: text.index("-----BEGIN CERTIFICATE")]
    cluster.file_of("n1").with_name(f"identity.pem.{token.id}").write_text(key)  # as it was before the answer
    cluster.file_of("n1").unlink()
    cluster.clock.ahead_s = 2 * HOUR_S
    assert cluster.join("n1", token) == first
    assert cluster.file_of("n1").read_text() == text
    refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n2", token))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from flops.adapters.sql_admission import SqlAdmissionStore
store = SqlAdmissionStore.admit
def admit(self, *arguments):
    if sys.argv[3] == "after":
        store(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)
SqlAdmissionStore.admit = admit
from flops.testing.safe_cluster import SafeCluster
cluster = SafeCluster(Path(sys.argv[1]), int(sys.argv[2]))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_between_signing_and_answering_neither_loses_nor_doubles_a_node(
    cluster: SafeCluster, when: str
) -> None:
    token = cluster.invite()
    cluster.close()
    command = [sys.executable, "-c", KILLED, str(cluster.folder), str(cluster.port), when]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        refused(ErrorCode.UNREACHABLE, lambda: cluster.join("n1", token))
        assert process.wait(20) == -9
    cluster.start()
    assert len(cluster.security.admission._store.certificates_of(NodeId("n1"))) == (when == "after")
    cluster.join("n1", token)
    assert len(cluster.security.admission._store.certificates_of(NodeId("n1"))) == 1
    with cluster.linked("n1") as played:
        played.expect(Welcome)
    refused(ErrorCode.JOIN_REFUSED, lambda: cluster.join("n2", token))


# Certificates


def test_a_node_that_lies_about_its_name_is_refused_and_harms_nobody(
    cluster: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.join("n1")
    cluster.join("liar")
    with cluster.linked("n1") as honest:
        honest.expect(Welcome)
        error = cluster.refusal_of("liar", says_it_is="n1")
        assert error.code is ErrorCode.CERTIFICATE_REFUSED
        assert "liar" in error.message
        assert "liar" in caplog.text
        assert cluster.connected() == {"n1"}
        cluster.orchestrator.start_service(spec("s1", "n1"))
        honest.expect(StartService)
        with cluster.linked("liar") as played:
            played.expect(Welcome)
            played.link.send(hello("n1"))  # nor later, on a connection of its own
            assert "said hello as n1" in played.expect(Refused).error["message"]


def test_a_node_can_only_report_on_itself(cluster: SafeCluster) -> None:
    cluster.join("n1")
    cluster.join("n2")
    with cluster.linked("n1") as one, cluster.linked("n2") as two:
        one.expect(Welcome)
        two.expect(Welcome)
        cluster.orchestrator.start_service(spec("s1", "n1"))
        one.expect(StartService)
        status = ServiceStatus(service_id=ServiceId("s1"), state=ServiceState.COMPLETED)
        two.link.send(ServiceChanged(status=status))
        assert two.expect(RemoveService).service_id == "s1"
    assert cluster.orchestrator.services()[0].status.state is ServiceState.PENDING


def test_a_removed_node_is_locked_out_at_once_and_for_good(cluster: SafeCluster) -> None:
    cluster.join("n1")
    cluster.join("n2")
    with cluster.linked("n1") as removed, cluster.linked("n2") as stays:
        removed.expect(Welcome)
        stays.expect(Welcome)
        cluster.orchestrator.start_service(spec("s1", "n1"))
        removed.expect(StartService)
        refused(ErrorCode.CONFLICT, lambda: cluster.orchestrator.remove_node(NodeId("n1")))
        cluster.orchestrator.remove_node(NodeId("n1"), is_forced=True)
        assert removed.expect(RemoveService).service_id == "s1"
        assert removed.expect(Refused).error["code"] == ErrorCode.CERTIFICATE_REFUSED.value
        refused(ErrorCode.UNREACHABLE, lambda: removed.link.receive(20))
        cluster.orchestrator.start_service(spec("s2", "n2"))
        stays.expect(StartService)
        assert {node.id for node in cluster.orchestrator.nodes()} == {"n2"}
    assert "removed" in cluster.refusal_of("n1").message
    assert cluster.get(f"/api/blobs/{'0' * 64}", cluster.tls_of("n1")) == (403, "certificate_refused")
    refused(ErrorCode.CERTIFICATE_REFUSED, lambda: renew_identity(cluster.file_of("n1"), cluster.address))
    cluster.restart()
    assert "removed" in cluster.refusal_of("n1").message
    cluster.join("n1")  # by a new token, with a new key
    with cluster.linked("n1") as played:
        played.expect(Welcome)


def test_a_certificate_that_has_expired_ends_the_connection_and_is_refused(cluster: SafeCluster) -> None:
    cluster.join("n1")
    with cluster.linked("n1") as played:
        played.expect(Welcome)
        cluster.clock.ahead_s = LIFE_S + 1
        error = FlopsError.from_dict(played.expect(Refused).error)
        assert error.code is ErrorCode.CERTIFICATE_REFUSED
        assert "expired" in error.message
    assert "expired" in cluster.refusal_of("n1").message
    refused(ErrorCode.CERTIFICATE_REFUSED, lambda: renew_identity(cluster.file_of("n1"), cluster.address))


def test_a_certificate_is_renewed_for_the_same_key(cluster: SafeCluster) -> None:
    first = cluster.join("n1")
    assert not first.is_due(cluster.clock.now_s())
    assert first.is_due(cluster.clock.now_s() + LIFE_S * 0.7)
    cluster.clock.ahead_s = LIFE_S * 0.7
    second = renew_identity(cluster.file_of("n1"), cluster.address)
    assert second.not_after_s - first.not_after_s == pytest.approx(LIFE_S * 0.7, abs=60)
    cluster.clock.ahead_s = LIFE_S * 1.2
    with cluster.linked("n1") as played:
        played.expect(Welcome)


def test_a_certificate_of_another_cluster_is_refused(
    cluster: SafeCluster, other: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    other.join("n1")
    here = cluster.security.admission.authority_pem
    context = cluster_tls(here, other.file_of("n1"))

    def dial() -> None:
        link = dial_cluster(cluster.address, tls=context)
        try:
            link.receive(5)
        finally:
            link.close()

    refused(ErrorCode.CERTIFICATE_REFUSED, dial)
    until(lambda: "TLS handshake failed" in caplog.text, "the operator is told")
    error = refused(
        ErrorCode.CERTIFICATE_REFUSED, lambda: dial_cluster(cluster.address, tls=other.tls_of("n1"))
    )
    assert "not the cluster that this node has joined" in error.message
    assert cluster.orchestrator.nodes() == []


def test_a_node_cannot_play_the_cluster(cluster: SafeCluster) -> None:
    cluster.join("n1")
    tls = server_tls(cluster.file_of("n1"), None)
    server = HttpServer(
        build_app(cluster.orchestrator, FileBlobs(cluster.folder / "b")), "127.0.0.1", 0, tls=tls
    )
    server.start()
    try:
        dial = functools.partial(dial_cluster, f"127.0.0.1:{server.port}", tls=cluster.tls_of("n1"))
        refused(ErrorCode.CERTIFICATE_REFUSED, dial)
    finally:
        server.close()


# In the clear


def test_plaintext_to_a_port_that_encrypts_is_told_on_both_sides(
    cluster: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    error = refused(ErrorCode.ENCRYPTION_MISMATCH, lambda: dial_cluster(cluster.address))
    assert "--token" in error.hint
    until(lambda: "http request" in caplog.text, "the operator is told")


def test_tls_to_a_port_that_does_not_encrypt_is_told_on_both_sides(
    cluster: SafeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.join("n1")
    plain = HttpServer(build_app(cluster.orchestrator, FileBlobs(cluster.folder / "b")), "127.0.0.1", 0)
    plain.start()
    try:
        dial = functools.partial(dial_cluster, f"127.0.0.1:{plain.port}", tls=cluster.tls_of("n1"))
        refused(ErrorCode.ENCRYPTION_MISMATCH, dial)
        until(lambda: "does not encrypt" in caplog.text, "the operator is told")
    finally:
        plain.close()


# Blobs


def test_blobs_are_for_nodes_and_for_services_while_they_run(cluster: SafeCluster) -> None:
    path = f"/api/blobs/{hashlib.sha256(b'').hexdigest()}"
    cluster.join("n1")
    assert cluster.get("/") == (200, "")
    assert cluster.get(path) == (401, "unauthenticated")
    assert cluster.get("/v2/x/tags/list") == (401, "unauthenticated")
    assert cluster.get("/elsewhere") == (403, "certificate_refused")
    assert cluster.get(path, cluster.tls_of("n1")) == (404, "not_found")
    with cluster.linked("n1") as played:
        played.expect(Welcome)
        cluster.orchestrator.start_service(spec("s1", "n1"))
        key = played.expect(StartService).spec.key
        assert cluster.get(path, auth=("s1", key)) == (404, "not_found")
        assert cluster.get(path, auth=("s2", key)) == (403, "forbidden")
        status = ServiceStatus(service_id=ServiceId("s1"), state=ServiceState.COMPLETED)
        played.link.send(ServiceChanged(status=status))
        until(lambda: cluster.get(path, auth=("s1", key)) == (403, "forbidden"), "its key ends with it")


def test_a_node_that_may_hold_data_gets_a_certificate_for_its_data_server_and_renews_it(
    cluster: SafeCluster, tmp_path: Path
) -> None:
    cluster.join("n1")
    cluster.join("builder", cluster.invite(addons=(IMAGE_BUILDER_ADDON,)))
    file, now_s = tmp_path / "identity.pem", cluster.clock.now_s()

    def certify(node_id: str, at_s: float = now_s) -> bool:
        return certify_service(cluster.file_of(node_id), cluster.address, DATA_SERVER, file, at_s)

    refused(ErrorCode.FORBIDDEN, lambda: certify("builder"))
    assert not file.exists()
    assert certify("n1")
    first = read_identity(file)
    assert first is not None
    assert first.node_id == data_server_name("n1")
    assert not certify("n1")
    assert certify("n1", now_s + (first.not_after_s - now_s) * 0.7)
    cluster.security.admission.expel(NodeId("n1"))
    refused(ErrorCode.CERTIFICATE_REFUSED, lambda: certify("n1", first.not_after_s))


def test_mlflow_is_for_aggregators_while_they_run(cluster: SafeCluster) -> None:
    path = "/mlflow/api/2.0/mlflow/experiments/search"
    cluster.join("n1")
    assert cluster.get(path) == (401, "unauthenticated")
    assert cluster.get(path, cluster.tls_of("n1")) == (401, "unauthenticated")  # nodes have no business there
    with cluster.linked("n1") as played:
        played.expect(Welcome)
        cluster.orchestrator.start_service(
            spec("a1", "n1").model_copy(update={"kind": ServiceKind.AGGREGATOR})
        )
        aggregator = ("a1", played.expect(StartService).spec.key)
        cluster.orchestrator.start_service(spec("s1", "n1"))
        learner = ("s1", played.expect(StartService).spec.key)
        assert cluster.get(path, auth=aggregator) == (
            404,
            "not_found",
        )  # let through; nothing is behind it here
        assert cluster.get(path, auth=learner) == (403, "forbidden")
        assert cluster.get(path, auth=("a1", learner[1])) == (403, "forbidden")
        status = ServiceStatus(service_id=ServiceId("a1"), state=ServiceState.COMPLETED)
        played.link.send(ServiceChanged(status=status))
        until(lambda: cluster.get(path, auth=aggregator) == (403, "forbidden"), "its key ends with it")


def test_only_the_node_of_an_aggregator_gets_its_certificate(cluster: SafeCluster, tmp_path: Path) -> None:
    for node_id in ("n1", "n2"):
        cluster.join(node_id)
    with cluster.linked("n1") as played:
        played.expect(Welcome)
        aggregator = spec("a1", "n1").model_copy(update={"kind": ServiceKind.AGGREGATOR})
        cluster.orchestrator.start_service(aggregator)
        cluster.orchestrator.start_service(spec("s1", "n1"))
        now_s, file = cluster.clock.now_s(), tmp_path / "identity.pem"
        for node_id, service_id in (("n2", "a1"), ("n1", "s1"), ("n1", "unknown")):
            identity = cluster.file_of(node_id)
            ask = functools.partial(certify_service, identity, cluster.address, service_id, file, now_s)
            refused(ErrorCode.FORBIDDEN, ask)
        certify_service(cluster.file_of("n1"), cluster.address, "a1", file, now_s)
        text = file.read_text()
        found = read_identity(file)
        assert found is not None
        assert found.node_id == aggregator_name("p")
        certify_service(cluster.file_of("n1"), cluster.address, "a1", file, now_s)
        assert file.read_text() == text  # a restart of the service needs no new one
