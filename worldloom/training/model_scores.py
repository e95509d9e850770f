"""Scores of the world model on the newest rows, logged during training."""

import logging
from typing import Any

from lightning import Trainer

from worldloom.model_scores.model import average_scores, score_model
from worldloom.model_scores.report import describe_failures
from worldloom.timing import phase
from worldloom.training.callbacks import log_episodes
from worldloom.training.metrics import current_step, log_metrics
from worldloom.training.module import WorldModelModule
from worldloom.training.periodic import Periodic

log = logging.getLogger(__name__)

WINDOW = 512  # newest rows of a stream, in which the scored sequences are
STREAMS = 8  # scored at once; the next time others follow, so that every task has its turn


class ModelScores(Periodic):
    """Log imagination/...: how well the model predicts the rows that were collected last.

    In online runs the model has trained on few of these rows, and on each of them rarely. Offline
    they are the last rows of the dataset. docs/inspecting.md explains the scores.

    every: updates between two scores, "auto" for about ten per run, or 0 for none.
    """

    at_least = 100

    def __init__(self, every: int | str = "auto") -> None:
        super().__init__(every)
        self._reported: set[str] = set()

    def act(self, trainer: Trainer, module: WorldModelModule) -> None:
        """Score the model in all ranks, each on its own rows, and log the means."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        with phase("scores"):
            total = data.buffer.num_envs
            count = min(total, STREAMS)
            first = module.updates // self.interval * count
            streams = [(first + i) % total for i in range(count)]
            window = data.buffer.newest(WINDOW, streams=streams)
            scores, failures = score_model(module.model, window)
            everywhere = data.ranks.gather(scores)
        if trainer.is_global_zero:
            for name, line in describe_failures(failures).items():
                if name not in self._reported:
                    log.warning("%s; the run continues without", line)
            self._reported |= failures.keys()
        means = {f"imagination/{name}": mean for name, mean in average_scores(everywhere).items()}
        if means:
            log_episodes(trainer, data.collector)  # earlier points first
            log_metrics(trainer, means, current_step(trainer))
