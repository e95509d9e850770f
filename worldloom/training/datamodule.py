"""Feed the trainer: collect the environment steps that the train ratio owes, then hand out a batch.

B is batch_size and T sequence_length throughout.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import lightning
import torch

from worldloom.errors import require_positive
from worldloom.protocol import Batch
from worldloom.replay.buffer import ReplayBuffer, to_device
from worldloom.timing import phase


class Collects(Protocol):
    """What the data module needs of a collector."""

    @property
    def env_steps(self) -> int:
        """Count the transitions collected so far, over all environments."""

    @property
    def num_envs(self) -> int:
        """Count the environments, each of which adds one row per step."""

    def step(self) -> Any:
        """Step every environment once and add the rows to the replay."""

    def close(self) -> None:
        """Close the environments."""

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, as tensors and plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class ReplayStream:
    """The batches of a run as an iterable of unknown length."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Start handing out batches."""
        return self._batches()

    def __len__(self) -> int:
        """Claim to be endless: for an iterable without a length Lightning draws one batch ahead.

        That batch would be chosen before the current update, and be lost in a checkpoint.
        """
        return 10**9

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module saves the state. Having this tells Lightning that."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, as `state_dict`."""


class ReplayDataModule(lightning.LightningDataModule):
    """Hand a stream of replayed batches to the trainer, collecting in between.

    With a collector the stream first collects `prefill` environment steps (B * T by default), then
    keeps replayed steps <= train_ratio * (environment steps since), and ends when `total_steps`
    environment steps are collected and trained on. Without one it ends after `total_steps` batches.

    train_ratio: None for one batch per environment step.
    pretrain: count the prefill's steps too, so that it is followed by all the batches it owes.

    sequence_length: rows that are trained on; if the replay stores fields of which a batch has
        only row 0, one more row is sampled in front of them as context.
    across_episodes: whether a sequence may run on into the next episode.
    refresh: None to collect between updates, where a run is bit for bit reproducible. A function
        to collect what the next batch is owed in a thread, while the trainer works on this one;
        it is called before, to give the collector's own copy of the model the newest weights.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        collector: Collects | None = None,
        *,
        batch_size: int,
        sequence_length: int,
        train_ratio: float | None = 32.0,
        prefill: int | None = None,
        pretrain: bool = False,
        total_steps: int,
        across_episodes: bool = True,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.collector = collector
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        per_batch = batch_size * sequence_length
        self.train_ratio = float(per_batch) if train_ratio is None else train_ratio
        self.pretrain = pretrain
        self.prefill = batch_size * sequence_length if prefill is None else prefill
        self.total_steps = total_steps
        self.across_episodes = across_episodes
        self.refresh = refresh
        # Called after every update and before every step of collecting; may raise to stop there.
        self.check: Callable[[], None] = lambda: None
        # Called before a state is made: the replay finishes one after the other.
        self.written: Callable[[], None] = lambda: None
        self._pool = None if refresh is None else ThreadPoolExecutor(1, "collector")
        self._ahead: Future[None] | None = None
        self.updates = 0
        self.replayed_steps = 0
        # Environment and replayed steps from which the train ratio counts: the end of prefill.
        self._origin: tuple[int, int] | None = None
        # New values of the model's fields, with the index and the rows of their batch.
        self._returned: tuple[torch.Tensor, Mapping[str, torch.Tensor], int] | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        require_positive(
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            total_steps=self.total_steps,
        )
        if self.train_ratio <= 0:
            raise ValueError(f"train_ratio is {self.train_ratio}; it must be above 0")
        if self.collector is not None and self._start >= self.total_steps:
            raise ValueError(
                f"training would start after {self._start} environment steps but total_steps is "
                f"{self.total_steps}; raise training.total_steps, or lower training.prefill, "
                "training.seed_episodes (of the environment's time limit), training.batch_size or "
                "training.sequence_length"
            )

    @property
    def env_steps(self) -> int:
        """Count the transitions collected so far; 0 in an offline run."""
        return 0 if self.collector is None else self.collector.env_steps

    @property
    def replay_ratio(self) -> float:
        """Return replayed steps per environment step since prefill; 0 before, and offline."""
        if self._origin is None or self.env_steps == self._origin[0]:
            return 0.0
        return (self.replayed_steps - self._origin[1]) / (self.env_steps - self._origin[0])

    def train_dataloader(self) -> ReplayStream:
        """Return the stream of batches, which goes on where the last one stopped."""
        return ReplayStream(self._offline if self.collector is None else self._online)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch; the time counts as part of sampling it."""
        with phase("sample"):
            return to_device(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """Return counters, replay and collector, so that the ratio is exact after a resume."""
        self.update_replay()
        self.written()
        return {
            "updates": self.updates,
            "replayed_steps": self.replayed_steps,
            "origin": self._origin,
            "train_ratio": self.train_ratio,
            "buffer": self.buffer.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if (self.collector is None) != (state_dict["collector"] is None):
            modes = ("offline", "online") if self.collector is None else ("online", "offline")
            raise ValueError(
                f"this run is {modes[0]} but the checkpoint is from an {modes[1]} run; resume with "
                f"data={modes[1]}, or start a new run from the checkpoint's model"
            )
        self.buffer.load_state_dict(state_dict["buffer"])
        if self.collector is not None:
            self.collector.load_state_dict(state_dict["collector"])
        self.updates = state_dict["updates"]
        self.replayed_steps = state_dict["replayed_steps"]
        self._origin = state_dict["origin"]
        if self._origin is not None and state_dict["train_ratio"] != self.train_ratio:
            # A changed ratio holds from now on; applied to the past it would owe a huge burst.
            self._origin = (self.env_steps, self.replayed_steps)

    def finish(self, state: dict[str, Any]) -> None:
        """Write what a saved state needs of the replay's files, and name them in it."""
        self.buffer.finish(state["buffer"])

    def keep(self, states: list[dict[str, Any]]) -> None:
        """Delete the replay's files that none of these states needs."""
        self.buffer.keep({name for state in states for name in state["buffer"]["files"]})

    def damaged(self, state: dict[str, Any]) -> list[str]:
        """Name the replay's files that a saved state needs and that are damaged or missing."""
        return self.buffer.damaged(state["buffer"])

    def store_fields(self, batch: Batch, values: Mapping[str, torch.Tensor]) -> None:
        """Accept what `compute_loss` returned for the replay: new values of the model's fields.

        They wait for `update_replay`, because rows are not written while others are being added.
        """
        self._returned = (batch["index"], values, batch["rewards"].shape[1])

    def update_replay(self) -> None:
        """Wait until nothing is being collected, then write the values of the last batch.

        Called before the next batch is sampled and before a state is saved; callbacks call it
        before they read the replay or the collector.
        """
        try:
            if self._ahead is not None:
                ahead, self._ahead = self._ahead, None
                with phase("collect"):
                    ahead.result()
        finally:
            if self._returned is not None:
                returned, self._returned = self._returned, None
                with phase("sample"):
                    self.buffer.write_fields(*returned)

    def close(self) -> None:
        """Close the environments, once nothing steps them any more."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self.collector is not None:
            self.collector.close()

    def _offline(self) -> Iterator[Batch]:
        while self.updates < self.total_steps:
            yield from self._next_batch()
        self._stop()

    def _online(self) -> Iterator[Batch]:
        assert self.collector is not None
        if self.refresh is not None:
            self.refresh()  # the trainer has moved the model since the copy was made
        if self._origin is None:
            with phase("prefill"):
                self._fill()
            self._origin = (0 if self.pretrain else self.env_steps, self.replayed_steps)
        while True:
            while self._owes_batch():
                yield from self._next_batch()
            if self.env_steps >= self.total_steps:
                break
            with phase("collect"):
                self._collect_owed()
        self._stop()

    def _collect_owed(self) -> None:
        """Collect until the next batch is owed, or everything is collected."""
        assert self.collector is not None
        while not self._owes_batch() and self.env_steps < self.total_steps:
            self.check()
            self.collector.step()

    @property
    def _rows(self) -> int:
        """Rows of a sampled sequence."""
        return self.sequence_length + self.buffer.context_rows

    @property
    def _start(self) -> int:
        """Environment steps after which every stream holds a sequence, and prefill is done."""
        return max(self.prefill, self._rows * self.buffer.num_envs)

    def _fill(self) -> None:
        """Collect until there is something to train on."""
        assert self.collector is not None
        within = {"across_episodes": self.across_episodes}
        while self.env_steps < self.prefill or (
            # Where all episodes are too short, waiting is in vain: sampling says so.
            self.env_steps < 2 * self._start and not self.buffer.can_sample(self._rows, **within)
        ):
            self.check()
            self.collector.step()

    def _owes_batch(self) -> bool:
        assert self._origin is not None
        owed = (self.env_steps - self._origin[0]) * self.train_ratio
        after = self.replayed_steps - self._origin[1] + self.batch_size * self.sequence_length
        return after <= owed

    def _next_batch(self) -> Iterator[Batch]:
        """Hand out one batch; once the trainer is done with it, bring the replay up to date."""
        with phase("sample"):
            batch = self.buffer.sample(
                self.batch_size, self._rows, across_episodes=self.across_episodes
            )
        self.updates += 1
        self.replayed_steps += self.batch_size * self.sequence_length
        if self.collector is not None and self.refresh is not None and self._pool is not None:
            with phase("collect"):
                self.refresh()
            self._ahead = self._pool.submit(self._collect_owed)
        yield batch
        self.update_replay()
        self.check()

    def _stop(self) -> None:
        """Tell Lightning that the data has ended for good, not just for this epoch."""
        if self.trainer is not None:
            self.trainer.should_stop = True
