"""The MLflow server's process: ``python -m flops.adapters.mlflow_process SOCKET PIPE DATABASE ROOT FOLDER``.

`flops.adapters.mlflow_server` starts it, with MLflow's settings in its environment. SOCKET is an inherited
listening socket; PIPE an inherited pipe whose other end its parent holds: when the parent is gone, however it
went, the pipe ends, and so does this process. ROOT is the URI that clients send artifacts to, FOLDER where
the server stores them. Why it is not ``mlflow server``: docs/adr/0003.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from mlflow.server.fastapi_app import app
from mlflow.server.handlers import _get_tracking_store, initialize_backend_stores
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from flops.adapters.mlflow_purge import purge_for_ever

_GRACE_S = 3


def _end_with_parent(pipe: int) -> None:
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * _GRACE_S)
    os._exit(1)


async def serve_without_assistant(scope: Scope, receive: Receive, send: Send) -> None:
    """MLflow without its AI assistant, which runs shell commands on this machine for local users."""
    if scope["type"] == "http" and "/mlflow/assistant" in scope["path"]:
        await PlainTextResponse("not offered", status_code=404)(scope, receive, send)
    else:
        await app(scope, receive, send)


def main(argv: Sequence[str]) -> None:
    """Bring the database up to date, then serve on the inherited socket until SIGTERM or the parent's end."""
    listener, pipe, database, artifacts, folder = argv
    threading.Thread(target=_end_with_parent, args=(int(pipe),), daemon=True).start()
    initialize_backend_stores(database, database, artifacts)
    cleaning = (_get_tracking_store(), Path(folder))
    threading.Thread(target=purge_for_ever, args=cleaning, daemon=True).start()
    config = uvicorn.Config(
        serve_without_assistant, access_log=False, lifespan="on", timeout_graceful_shutdown=_GRACE_S
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(listener))])


if __name__ == "__main__":
    main(sys.argv[1:])
