"""Work that a run does a number of times, evenly spread over its updates."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from worldloom.training.module import WorldModelModule


class Periodic(Callback):
    """Call `act` at regular intervals, and once more at the end.

    every: updates between two calls, "auto" for about `times` calls per run, or 0 for none.
    at_least: smallest interval that "auto" chooses.

    Raises:
        ValueError: `every` is neither auto nor a number of at least 0.
    """

    times = 10
    at_least = 1

    def __init__(self, every: int | str = "auto") -> None:
        if every != "auto" and (not isinstance(every, int) or every < 0):
            raise ValueError(f"every is {every!r}; expected a number of updates, auto, or 0")
        self.every = every
        self.interval = 0  # updates
        self._total = 0  # total_steps for which "auto" chose the interval; 0 if it did not
        self._done = 0  # updates at the last call

    def act(self, trainer: Trainer, module: WorldModelModule) -> None:
        """Do the work; all ranks call this after the same updates."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the interval; a resumed run keeps it unless its length has changed."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(self.every, int):
            self.interval, self._total = self.every, 0
        elif self._total != data.total_steps:
            self.interval = max(self.at_least, data.expected_updates // self.times)
            self._total = data.total_steps

    def state_dict(self) -> dict[str, int]:
        """Return the interval, the run's length that it was chosen for, and the last call."""
        return {"interval": self.interval, "total": self._total, "done": self._done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.interval, self._total = state_dict["interval"], state_dict["total"]
        self._done = state_dict.get("done", 0)  # the first runs call it "drawn"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if it is due."""
        assert isinstance(pl_module, WorldModelModule)
        if self.interval and pl_module.updates % self.interval == 0:
            self._act(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act on the final model unless it was the last one."""
        assert isinstance(pl_module, WorldModelModule)
        if self.interval and pl_module.updates != self._done:
            self._act(trainer, pl_module)

    def _act(self, trainer: Trainer, module: WorldModelModule) -> None:
        self._done = module.updates
        trainer.datamodule.update_replay()  # type: ignore[attr-defined]
        self.act(trainer, module)
