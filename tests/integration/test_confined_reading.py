"""A confined learner reads the files of its tags, which the node's data server tells it, and no others."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import flight

from flops.actor import ActorContext
from flops.adapters import confinement
from flops.adapters.control_groups import find_control_groups
from flops.adapters.parquet_store import ParquetStore
from flops.adapters.process_runtime import ProcessRuntime
from flops.core.cluster import Resources, ServiceKind
from flops.core.ids import ServiceId
from flops.dataserver.catalogue import Catalogue
from flops.dataserver.server import DataServer
from flops.node.service_reach import service_reach
from flops.testing.waiting import until
from flops.wire.flight import Right, Scope, UploadName, mint_token

LEARNER = ServiceId("learner")
TOKEN = "admin-secret"
pytestmark = pytest.mark.skipif(
    "files" not in confinement.limits()[0], reason="this kernel keeps no files from processes"
)

LEARN = """
import json, sys
from flops_utils.local_data import DataSource, use_source
from flops_utils.ml_repo_building_blocks import load_table
address, token, *others = sys.argv[1:]
use_source(DataSource(address, token, ("mine",)))
opened = []
for path in others:
    try:
        open(path).close()
        opened.append(path)
    except PermissionError:
        pass
print(json.dumps({"rows": load_table()["n"].to_pylist(), "opened": opened}), flush=True)
"""


class ServerThatGivesNoRows(DataServer):
    def do_get(self, context: flight.ServerCallContext, ticket: flight.Ticket) -> flight.FlightDataStream:
        raise flight.FlightServerError("The rows were not to come through the server.")


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[ProcessRuntime]:
    runtime = ProcessRuntime(
        tmp_path / "runtime", tmp_path / "logs", find_control_groups(), hidden=[tmp_path]
    )
    yield runtime
    runtime.stop(LEARNER, grace_s=0.3)


def test_a_confined_learner_reads_the_files_of_its_tags_only(tmp_path: Path, runtime: ProcessRuntime) -> None:
    data = tmp_path / "dataserver"
    catalogue = Catalogue(ParquetStore(data))
    for tag in ("mine", "other"):
        upload = catalogue.open_upload(UploadName(tag, "x"), pa.schema({"n": pa.int64()}))
        upload.write(pa.record_batch({"n": range(100)}))
        upload.seal()
        upload.commit()
    (data / "token").write_text(TOKEN)
    (other,) = data.glob("tags/other/*.parquet")
    work = tmp_path / "work"
    work.mkdir()
    with ServerThatGivesNoRows(catalogue, TOKEN, "127.0.0.1", 0) as server:
        address, token = f"127.0.0.1:{server.port}", mint_token(TOKEN, Scope(Right.READ, ("mine",)))
        config = {"aggregator": "127.0.0.1:1", "data_tags": ["mine"]}
        context = ActorContext(
            LEARNER, "p1", "n", str(work), data_address=address, data_dir=str(data / "tags"), config=config
        )
        argv = [sys.executable, "-c", LEARN, address, token, str(other), str(data / "token")]
        reach = service_reach(ServiceKind.LEARNER, context, os.environ)
        env = {"PATH": os.defpath, "HOME": str(work)}
        runtime.start(LEARNER, argv, env, work, Resources(), reach)
        until(lambda: runtime.status(LEARNER).state.is_final)
    assert json.loads(runtime.output(LEARNER)) == {"rows": list(range(100)), "opened": []}
