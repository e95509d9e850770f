"""Settings of a run that belong to no model and no environment, checked when they are made."""

import math
from dataclasses import dataclass, fields


@dataclass
class TrainingConfig:
    """How long and how hard to train; the `training` section of the configuration.

    Attributes:
        total_steps: environment steps of the whole run (optimiser updates if offline).
        batch_size: sequences per update.
        sequence_length: steps per sequence that are trained on.
        learning_rate: of the optimiser.
        warmup: updates over which the learning rate rises from 0 (optimizer=laprop).
        anneal: update at which it has fallen to a tenth; 0 to keep it (optimizer=laprop).
        grad_clip: global gradient norm to clip to; None for no such clipping.
        train_ratio: replayed steps per environment step; updates per environment step are
            train_ratio / (batch_size * sequence_length). None for one update per step.
        prefill: environment steps before the first update; None for one batch of them.
        random_steps: environment steps with random actions at the start.
        seed_episodes: prefill and random steps last for so many episodes at least, by the
            environment's time limit (none if it has no limit).
        pretrain: train for the prefill's steps too, at once when it is over.
        log_every: updates between two points of train/… curves.
    """

    total_steps: int = 1_000_000
    batch_size: int = 16
    sequence_length: int = 64
    learning_rate: float = 4e-5
    warmup: int = 1000
    anneal: int = 0
    grad_clip: float | None = None
    train_ratio: float | None = 32.0
    prefill: int | None = None
    random_steps: int = 0
    seed_episodes: int = 0
    pretrain: bool = False
    log_every: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no run can have."""
        for name in ("total_steps", "batch_size", "learning_rate", "log_every"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        if self.train_ratio is not None:
            _require(self.train_ratio > 0, "train_ratio", self.train_ratio, "above 0, or null")
        _require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        for name in ("random_steps", "seed_episodes", "warmup", "anneal"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if self.grad_clip is not None:
            _require(self.grad_clip > 0, "grad_clip", self.grad_clip, "above 0, or null for none")
        if self.prefill is not None:
            _require(self.prefill >= 1, "prefill", self.prefill, "at least 1, or null for a batch")
        for name in ("learning_rate", "train_ratio", "grad_clip"):
            value = getattr(self, name)
            ok = value is None or math.isfinite(value)
            _require(ok, name, value, "a finite number")


@dataclass
class EvaluationConfig:
    """How the agent is scored, in environments of its own; the `evaluation` section.

    Attributes:
        episodes: episodes of the evaluation at the end of a run.
        every: environment steps between evaluations during the run; 0 for none.
        episodes_during: episodes of each of those, with seeds of their own.
        keep_best: whether the run's final model is the one that scored best during the run, where
            it was scored; otherwise it is the last.
        num_envs: environments side by side.
        deterministic: the policy's mode instead of samples.
        seed: of the evaluation environments; training seeds never reach it.
    """

    episodes: int = 20
    every: int = 0
    episodes_during: int = 10
    keep_best: bool = True
    num_envs: int = 10
    deterministic: bool = True
    seed: int = 1_000_003

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no evaluation can have."""
        for name in ("episodes", "episodes_during", "num_envs"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.every >= 0, "every", self.every, "at least 0")
        _require(0 <= self.seed < 2**32, "seed", self.seed, f"from 0 to {2**32 - 1}")


def field_names(cls: type) -> list[str]:
    """Return the names of a settings class."""
    return [f.name for f in fields(cls)]


def _require(ok: bool, name: str, value: object, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value}; expected {wanted}")
