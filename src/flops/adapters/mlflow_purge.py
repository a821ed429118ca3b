"""Permanent removal of experiments whose projects were deleted; a thread of the MLflow server's process.

Over its API, MLflow only hides what is deleted. ``mlflow gc`` removes it, but cannot be kept to some
experiments: it takes all runs and models along that people have deleted in the GUI and may want back. So the
server's own store is told, by the methods that ``mlflow gc`` uses; which experiments is marked by a tag.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

from mlflow.entities import Experiment, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlInput
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from flops.adapters.mlflow_shapes import PURGE_TAG

_LOOK_EVERY_S = 3.0
_PAGE = 1000

_log = logging.getLogger(__name__)


def purge_for_ever(store: SqlAlchemyStore, artifacts: Path) -> None:
    """Remove marked experiments, as long as the process lives.

    Args:
        store: the server's.
        artifacts: the folder of all artifacts, which has one of each experiment.
    """
    while True:
        try:
            for experiment in marked_experiments(store):
                purge(store, artifacts, experiment)
        except Exception:  # noqa: BLE001 (whatever it is: logged, and tried again)
            _log.exception("deleted experiments cannot be removed now")
        time.sleep(_LOOK_EVERY_S)


def marked_experiments(store: SqlAlchemyStore) -> list[Experiment]:
    """Deleted experiments that are to be removed."""
    condition = f"tags.`{PURGE_TAG}` = 'true'"
    return list(store.search_experiments(ViewType.DELETED_ONLY, _PAGE, condition))


def purge(store: SqlAlchemyStore, artifacts: Path, experiment: Experiment) -> None:
    """Remove an experiment with all it has. What a kill leaves of it is removed by the next call.

    The files go first: an id that has become free may be given to the next experiment.
    """
    shutil.rmtree(artifacts / str(int(experiment.experiment_id)), ignore_errors=True)
    while runs := store.search_runs([experiment.experiment_id], "", ViewType.ALL, _PAGE):
        for run in runs:  # before the experiment, which would load all their metrics to remove them
            with store.ManagedSessionMaker(read_only=False) as session:  # MLflow leaves these
                session.query(SqlInput).filter(SqlInput.source_id == run.info.run_id).delete()
            store._hard_delete_run(run.info.run_id)
    try:
        store._hard_delete_experiment(experiment.experiment_id)
    except MlflowException as exc:
        if exc.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    _log.info("experiment %s (%s) is removed", experiment.experiment_id, experiment.name)
