"""The stream of batches: collect the steps that the train ratio requires, then sample a batch."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import lightning
import torch

from worldloom.errors import require, require_positive
from worldloom.protocol import Batch
from worldloom.ranks import Ranks, seed_of_rank
from worldloom.replay.buffer import ReplayBuffer
from worldloom.timing import phase
from worldloom.training.interruption import Interrupted
from worldloom.training.randomness import seed_generators
from worldloom.training.stream import ReplayStream
from worldloom.trees import to_device

if TYPE_CHECKING:
    from worldloom.training.collector import Collector


class ReplayDataModule(lightning.LightningDataModule):
    """Provide the trainer with a stream of replayed batches, and collect between them.

    With a collector the stream first collects `prefill` environment steps, then collects and
    samples such that replayed steps <= train_ratio * (environment steps since prefill), and ends
    when `total_steps` environment steps are collected and trained on. Without a collector (offline)
    it ends after `total_steps` batches.

    train_ratio: replayed steps per environment step; None for one batch per environment step.
    prefill: None for the steps of one batch, batch_size * sequence_length.
    prefill_counts: what prefill counts: environment "steps", or "starts" of sequences in the
        replay, and then the first batch follows at once (official DreamerV3).
    count_resets: the train ratio and prefill also count the rows that resets add (likewise).
    pretrain: count the steps of the prefill too, so that all their batches follow it directly.
    sequence_length: rows that are trained on; if the replay stores fields of which a batch has
        only row 0, one more row is sampled in front of them as context.
    across_episodes: whether a sequence may continue into the next episode.
    batch_size, prefill and total_steps are those of all ranks together: each rank samples its share
    of a batch from the rows that it has collected.

    sync_acting_copy: None to collect between updates, which makes a run reproducible bit for bit.
        With a function, a thread collects for the next batch while the trainer works on the current
        one. The function is called first, to copy the weights to the collector's copy of the model.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        collector: "Collector | None" = None,
        *,
        batch_size: int,
        sequence_length: int,
        train_ratio: float | None = 32.0,
        prefill: int | None = None,
        prefill_counts: str = "steps",
        count_resets: bool = False,
        pretrain: bool = False,
        total_steps: int,
        across_episodes: bool = True,
        sync_acting_copy: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.buffer, self.collector = buffer, collector
        self.batch_size, self.sequence_length = batch_size, sequence_length
        per_batch = batch_size * sequence_length
        self.train_ratio = float(per_batch) if train_ratio is None else train_ratio
        self.prefill = per_batch if prefill is None else prefill
        self.prefill_counts, self.count_resets = prefill_counts, count_resets
        self.pretrain, self.total_steps = pretrain, total_steps
        self.across_episodes, self.sync_acting_copy = across_episodes, sync_acting_copy
        # Called after every update and before every environment step; may raise Interrupted to stop
        # there. What one rank raises stops all ranks, at the same place.
        self.check_interruption: Callable[[], None] = lambda: None
        self.ranks = Ranks()
        # Called before a state is created: the replay writes only one state at a time.
        self.wait_for_writer: Callable[[], None] = lambda: None
        overlaps = collector is not None and sync_acting_copy is not None
        self._pool = ThreadPoolExecutor(1, "collector") if overlaps else None
        self._ahead: Future[None] | None = None
        self._before = 0, 0  # environment steps, and those counted, at the start of `_ahead`
        self.updates = self.replayed_steps = 0
        # Counted steps and replayed steps from which the train ratio counts: after prefill.
        self._origin: tuple[int, int] | None = None
        # New values of the model's fields, with the index and the rows of their batch.
        self._returned: tuple[torch.Tensor, Mapping[str, torch.Tensor], int] | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        sizes = ("batch_size", "sequence_length", "total_steps")
        require_positive(**{name: getattr(self, name) for name in sizes})
        require(self.train_ratio > 0, "train_ratio", self.train_ratio, "a number above 0")
        counts = self.prefill_counts
        require(counts in ("steps", "starts"), "prefill_counts", counts, "steps or starts")
        if self.collector is not None and self._start >= self.total_steps:
            raise ValueError(
                f"training would start after {self._start} environment steps but total_steps is "
                f"{self.total_steps}; raise training.total_steps, or lower training.prefill, "
                "training.seed_episodes (of the environment's time limit), training.batch_size or "
                "training.sequence_length"
            )

    def setup(self, stage: str) -> None:
        """Connect to the other ranks, and seed this one's random numbers.

        The weights, which exist already, are the same in all ranks.

        Raises:
            ValueError: batch_size is not divisible by the number of ranks.
        """
        self.ranks.connect()
        if self.collector is not None:
            self.collector.ranks.connect()
        if self.ranks.size > 1:
            if self.batch_size % self.ranks.size:
                raise ValueError(
                    f"training.batch_size is {self.batch_size}, which {self.ranks.size} processes "
                    "cannot share equally; expected a multiple of their number"
                )
            seed_generators(seed_of_rank(torch.initial_seed() % 2**63))

    @property
    def stopping(self) -> bool:
        """Return whether all ranks have agreed to stop, each in a complete state."""
        return self.ranks.stopping or (self.collector is not None and self.collector.ranks.stopping)

    @property
    def env_steps(self) -> int:
        """Count the transitions collected so far; 0 in an offline run.

        Those that a thread is collecting now are not included, so that all ranks have the same
        number.
        """
        if self._ahead is not None:
            return self._before[0]
        return 0 if self.collector is None else self.collector.env_steps

    def _count(self, resets: bool) -> int:
        """Count the environment steps collected so far, or all rows: those of resets too."""
        assert self.collector is not None
        return self.buffer.rows_added * self.ranks.size if resets else self.collector.env_steps

    @property
    def complete(self) -> bool:
        """Return whether all steps are collected and trained on."""
        if self.collector is None:
            return self.updates >= self.total_steps
        collected = self._origin is not None and self.env_steps >= self.total_steps
        return collected and not self._batch_is_due()

    @property
    def replay_ratio(self) -> float:
        """Return replayed steps per counted step since prefill; 0 before, and offline."""
        if self._origin is None:
            return 0.0
        counted = self._count(self.count_resets) if self._ahead is None else self._before[1]
        return max(0, self.replayed_steps - self._origin[1]) / max(1, counted - self._origin[0])

    @property
    def expected_updates(self) -> int:
        """Return the number of updates at the end of the run, those before a resume included.

        An online run may do a few more or less: prefill and the run end with a step of all
        environments, some of which only begin an episode. Resets are counted as often as before.
        """
        if self.collector is None:
            return self.total_steps
        per_batch = self.batch_size * self.sequence_length
        steps, replayed = self._origin or self._find_origin(self._start)
        total: float = self.total_steps
        if self.count_resets and self.collector.env_steps:
            total *= self._count(True) / self.collector.env_steps
        batches = int(max(0, total - steps) * self.train_ratio) // per_batch
        return self.updates - (self.replayed_steps - replayed) // per_batch + batches

    def train_dataloader(self) -> ReplayStream:
        """Return the stream of batches, which continues where the previous one stopped."""
        return ReplayStream(self._offline if self.collector is None else self._online)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch; the time counts as part of sampling it."""
        with phase("sample"):
            return to_device(batch, device)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the states of replay and collector."""
        self.update_replay()
        self.wait_for_writer()
        return {
            "updates": self.updates,
            "replayed_steps": self.replayed_steps,
            "origin": self._origin,
            "train_ratio": self.train_ratio,
            "count_resets": self.count_resets,
            "buffer": self.buffer.state_dict(),
            "collector": None if self.collector is None else self.collector.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: the state is from an online run and this run is offline, or vice versa.
        """
        if (self.collector is None) != (state_dict["collector"] is None):
            modes = ("offline", "online") if self.collector is None else ("online", "offline")
            raise ValueError(
                f"this run is {modes[0]} but the checkpoint is from an {modes[1]} run; resume with "
                f"data={modes[1]}, or start a new run from the checkpoint's model with init_from=…"
            )
        self.buffer.load_state_dict(state_dict["buffer"])
        if self.collector is not None:
            self.collector.load_state_dict(state_dict["collector"])
        self.updates, self.replayed_steps = state_dict["updates"], state_dict["replayed_steps"]
        self._origin = state_dict["origin"]
        before = state_dict["train_ratio"], state_dict.get("count_resets", False)
        if self._origin is not None and before != (self.train_ratio, self.count_resets):
            # A changed ratio applies from now on; applied to past steps it would require a burst.
            self._origin = (self._count(self.count_resets), self.replayed_steps)

    def finish(self, state: dict[str, Any]) -> None:
        """Write the replay files that a state needs and list them in it."""
        self.buffer.finish(state["buffer"])

    def keep(self, states: list[dict[str, Any]]) -> None:
        """Delete the replay files that none of these states needs."""
        self.buffer.keep({name for state in states for name in state["buffer"]["files"]})

    def damaged(self, state: dict[str, Any]) -> list[str]:
        """Return the replay files of a saved state that are damaged or missing."""
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
        """Wait for the collecting thread and close the environments."""
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
        if self.sync_acting_copy is not None:
            self.sync_acting_copy()  # the trainer has moved the model since the copy was made
        if self._origin is None:
            with phase("prefill"):
                self._fill()
            self._origin = self._find_origin(self._count(self.count_resets))
        while True:
            while self._batch_is_due():
                yield from self._next_batch()
            if self.env_steps >= self.total_steps:
                break
            with phase("collect"):
                self._collect()
        self._stop()

    def _collect(self) -> None:
        """Collect until the next batch is due or all environment steps are done."""
        assert self.collector is not None
        while not self._batch_is_due() and self.collector.env_steps < self.total_steps:
            self._step()

    def _step(self) -> None:
        """Collect a step of each environment; record the updates so far with finished episodes."""
        assert self.collector is not None
        request = self._find_request()
        before = len(self.collector.finished)
        stop = self.collector.step(request is not None)
        for episode in self.collector.finished[before:]:
            episode["updates"] = self.updates
        if stop:
            self._stop_together(self.collector.ranks, request)

    def _check(self) -> None:
        """Stop after an update if any rank asks for it."""
        request = self._find_request()
        if self.ranks.share(request is not None).any():
            self._stop_together(self.ranks, request)

    def _find_request(self) -> BaseException | None:
        """Return what asks this rank to stop; raise it if this is the only one."""
        try:
            self.check_interruption()
        except Interrupted as request:
            if self.ranks.size == 1:
                raise
            return request
        return None

    @staticmethod
    def _stop_together(ranks: Ranks, request: BaseException | None) -> None:
        """Raise the first rank's request to stop in all ranks."""
        ranks.stopping = True
        raise next(found for found in ranks.gather(request) if found is not None)

    @property
    def _rows(self) -> int:
        """Return the rows of a sampled sequence."""
        return self.sequence_length + self.buffer.context_rows

    @property
    def _start(self) -> int:
        """Return the steps to collect until prefill is done and every stream can be sampled."""
        streams = self.buffer.num_envs * self.ranks.size
        prefill = self.prefill
        if self.prefill_counts == "starts":  # a stream's last rows are no starts
            prefill = streams * (-(-prefill // streams) + self._rows - 1)
        return max(prefill, self._rows * streams)

    def _find_origin(self, counted: int) -> tuple[int, int]:
        """Return the steps from which the train ratio counts, if prefill ends at `counted`."""
        if self.pretrain:
            return 0, self.replayed_steps
        at_once = self.batch_size * self.sequence_length * (self.prefill_counts == "starts")
        return counted, self.replayed_steps + at_once

    def _fill(self) -> None:
        """Collect until prefill is done and a sequence can be sampled."""
        starts = self.prefill_counts == "starts"
        # The row that finishes an episode is only stored with the step after it.
        prefill = (self._start if starts else self.prefill) + self.buffer.finished_episodes
        while self._count(starts or self.count_resets) < prefill or (
            # If all episodes are too short, stop here: sampling raises an error that explains it.
            self.env_steps < self._latest() and not self._can_sample()
        ):
            self._step()
        if self.env_steps >= self.total_steps and not self._can_sample():
            self.buffer.sample(1, self._rows, across_episodes=self.across_episodes)  # raises

    def _latest(self) -> int:
        """Return until which environment step to wait for a sequence after prefill."""
        if self.buffer.finished_episodes and not self.ranks.share(self.buffer.can_sample(1)).all():
            return self.total_steps  # no episode of some rank is finished
        return 2 * self._start

    def _can_sample(self) -> bool:
        """Return whether every rank has a sequence to sample."""
        can = self.buffer.can_sample(self._rows, across_episodes=self.across_episodes)
        return bool(self.ranks.share(can).all())

    def _batch_is_due(self) -> bool:
        assert self._origin is not None and self.collector is not None
        allowed = (self._count(self.count_resets) - self._origin[0]) * self.train_ratio
        after = self.replayed_steps - self._origin[1] + self.batch_size * self.sequence_length
        return after <= allowed

    def _next_batch(self) -> Iterator[Batch]:
        """Yield one batch; after the trainer has used it, update the replay."""
        with phase("sample"):
            batch = self.buffer.sample(
                self.batch_size // self.ranks.size, self._rows, across_episodes=self.across_episodes
            )
        self.updates += 1
        self.replayed_steps += self.batch_size * self.sequence_length
        if self._pool is not None and self.sync_acting_copy is not None:
            with phase("collect"):
                self.sync_acting_copy()
            self._before = self.env_steps, self._count(self.count_resets)
            self._ahead = self._pool.submit(self._collect)
        yield batch
        self.update_replay()
        self._check()

    def _stop(self) -> None:
        """Tell Lightning that the data has ended for the whole run, not only for this epoch."""
        if self.trainer is not None:
            self.trainer.should_stop = True
