"""Weights & Biases: the logger of `logger=wandb`."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from worldloom.files import remember


class WandB(WandbLogger):
    """A W&B run whose files are in the run folder; resuming the run continues the same W&B run.

    The x-axis of all charts is "step": environment steps, or updates in an offline run. Points that
    are logged again after a resume appear twice, at the same position.

    Args:
        folder: run folder; the files of W&B are in its subfolder wandb.
        project, entity, group, tags, notes: as in `wandb.init`.
        name: name of the W&B run; None for the last two parts of the folder, or in a sweep for the
            last one, which contains what differs.
        sweep: name of the sweep; the W&B group if `group` is None.
        offline: only write files, which `wandb sync` uploads later.
        options: further arguments of `lightning.pytorch.loggers.WandbLogger` and `wandb.init`.
    """

    def __init__(
        self,
        folder: str | Path,
        project: str | None = "worldloom",
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] | None = None,
        notes: str | None = None,
        offline: bool = False,
        sweep: str | None = None,
        **options: Any,
    ) -> None:
        self._folder = Path(folder)
        options |= {
            "entity": entity,
            "group": group or sweep,
            "tags": list(tags or ()),
            "notes": notes,
        }
        name = name or "/".join(self._folder.parts[-1 if sweep else -2 :])
        super().__init__(name, self._folder, offline=offline, project=project, **options)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the W&B run, which starts here."""
        import wandb

        if self._experiment is None:
            # Not one of wandb's own ids: they may draw from the random generators of the run.
            self._id = remember(self._folder / "wandb" / "run_id", lambda: secrets.token_hex(4))
            options = {k: v for k, v in self._wandb_init.items() if v is not None}
            options |= {"id": self._id} | ({"mode": "offline"} if self._offline else {})
            self._experiment = wandb.init(**options)
            self._experiment.define_metric("*", step_metric="step", step_sync=True)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a point to each chart.

        W&B's own counter of calls is not the x-axis: it must never decrease, but the points of
        episodes are older than the newest point, and a resumed run logs some points again.
        """
        self.experiment.log(dict(metrics) if step is None else {**metrics, "step": step})
