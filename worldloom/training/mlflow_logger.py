"""MLflow: the logger of `logger=mlflow`."""

import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger

from worldloom.files import read_id, remember
from worldloom.trees import flatten_tree

LONGEST = 500  # characters of a parameter; servers before MLflow 2.8 accept no more
STATUS = {"success": "FINISHED", "failed": "FAILED", "aborted": "KILLED"}


class MLflow(MLFlowLogger):
    """An MLflow run; resuming the run continues the same MLflow run.

    Args:
        folder: run folder; its subfolder mlflow has the id of the MLflow run, and the store unless
            `tracking_uri` names another one.
        experiment_name: the experiment, which is created if it does not exist.
        run_name: name of the MLflow run; None for the last two parts of the folder, or in a sweep
            for the last one, which contains what differs.
        tracking_uri: server or store, such as http://localhost:5000 or sqlite:////data/mlflow.db;
            None for the environment variable MLFLOW_TRACKING_URI, or an SQLite store in the folder.
        tags: {name: value} of the MLflow run.
        sweep: name of the sweep; a tag of the MLflow run.
        options: further arguments of `lightning.pytorch.loggers.MLFlowLogger`.
    """

    def __init__(
        self,
        folder: str | Path,
        experiment_name: str = "worldloom",
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, Any] | None = None,
        sweep: str | None = None,
        **options: Any,
    ) -> None:
        self._folder = Path(folder) / "mlflow"
        tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not tracking_uri:
            tracking_uri = f"sqlite:///{self._folder.absolute()}/mlflow.db"
            options.setdefault("artifact_location", str(self._folder.absolute() / "artifacts"))
        run_name = run_name or "/".join(Path(folder).parts[-1 if sweep else -2 :])
        tags = {**(tags or {}), **({"sweep": sweep} if sweep else {})}
        super().__init__(experiment_name, run_name, tracking_uri, tags, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the client; the MLflow run starts here, or continues."""
        if not self._initialized:
            file = self._folder / "run_id"
            if file.exists():
                self._run_id = read_id(file)
            client = self._mlflow_client
            if client.get_experiment_by_name(self._experiment_name) is None:
                client.create_experiment(self._experiment_name, self._artifact_location)
            client = super().experiment
            remember(file, lambda: str(self._run_id))
            client.update_run(self._run_id, status="RUNNING")
        return self._mlflow_client

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add the settings as parameters; changes on resume as tags, as parameters are constant."""
        from mlflow.entities import Param, RunTag

        flat = flatten_tree(vars(params) if isinstance(params, Namespace) else params, ".")
        texts = {re.sub(r"[^\w./ -]", "_", k)[:250]: str(v)[:LONGEST] for k, v in flat.items()}
        before = self.experiment.get_run(self.run_id).data.params
        changed = {k: v for k, v in texts.items() if before.get(k, v) != v}
        new = [Param(k, v) for k, v in texts.items() if k not in before]
        for start in range(0, len(new), 100):  # the most that a request may have
            self.experiment.log_batch(self.run_id, params=new[start : start + 100])
        self.experiment.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in changed.items()])

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Set the status of the MLflow run; one that a signal or a limit stops is KILLED."""
        stopped = sys.exc_info()[1]
        if stopped is not None and not isinstance(stopped, Exception):
            status = "aborted"
        super().finalize("success" if status == "aborted" else status)
        if self._initialized:
            self.experiment.set_terminated(self.run_id, STATUS.get(status, "FINISHED"))
