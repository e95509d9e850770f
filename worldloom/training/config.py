"""Settings classes of the configuration's sections; each checks its values when it is created."""

import math
import re
from dataclasses import dataclass
from typing import Any

from worldloom.envs.time_limit import SECONDS
from worldloom.errors import require, require_positive
from worldloom.memory import require_memory
from worldloom.replay.episodes import require_drawing

# Lower limits of the memory that anything takes, to find settings that no machine can have.
ENV_BYTES, WORKER_BYTES, ROW_BYTES = 2**14, 2**25, 16


@dataclass
class TrainingConfig:
    """Length and intensity of training: the `training` section.

    Attributes:
        total_steps: environment steps of the whole run (updates if offline).
        batch_size: sequences per update.
        sequence_length: rows per sequence that are trained on.
        learning_rate: learning rate of the optimiser.
        warmup: updates over which the learning rate rises from 0 (optimizer=laprop).
        anneal: update at which the learning rate has fallen to a tenth; 0 to keep it constant
            (optimizer=laprop).
        grad_clip: maximum norm of all gradients together; None for no clipping.
        train_ratio: replayed steps per environment step. One environment step is followed by
            train_ratio / (batch_size * sequence_length) updates. None for one update per step.
        prefill: environment steps before the first update; None for as many as one batch has.
        prefill_counts: "steps", or "starts": prefill is then a number of start positions of
            sequences in the replay, and the first update follows at once (official DreamerV3).
        count_resets: the rows that resets add count as steps for train_ratio and prefill
            (official DreamerV3); total_steps never counts them.
        random_steps: environment steps with random actions at the start.
        seed_episodes: minimum length of prefill and of the random steps, in episodes of the
            environment's time limit (no effect without a time limit).
        pretrain: also do the updates that belong to the steps of the prefill, right after it.
        log_every: updates between two points of the loss/… and stats/… curves.
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
    prefill_counts: str = "steps"
    count_resets: bool = False
    random_steps: int = 0
    seed_episodes: int = 0
    pretrain: bool = False
    log_every: int = 100

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        names = ("total_steps", "batch_size", "log_every")
        require_positive(**{name: getattr(self, name) for name in names})
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        for name in ("random_steps", "seed_episodes", "warmup", "anneal"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        _require_size("learning_rate", self.learning_rate, "")
        batch = f"batch_size={self.batch_size}, sequence_length={self.sequence_length}"
        require_memory(ROW_BYTES * self.batch_size * self.sequence_length, batch)
        if self.train_ratio is not None:
            _require_size("train_ratio", self.train_ratio, ", or null for one update per step")
        if self.grad_clip is not None:
            _require_size("grad_clip", self.grad_clip, ", or null for no clipping")
        if self.prefill is not None:
            require(self.prefill >= 1, "prefill", self.prefill, "at least 1, or null for a batch")
        counts = self.prefill_counts
        require(counts in ("steps", "starts"), "prefill_counts", counts, "steps or starts")
        if counts == "starts" and self.seed_episodes:
            raise ValueError(
                f"seed_episodes is {self.seed_episodes}, which prolongs prefill in steps, but "
                "prefill_counts is 'starts'; set training.prefill_counts=steps or "
                "training.seed_episodes=0"
            )


@dataclass
class EvaluationConfig:
    """Evaluation of the agent, in separate environments: the `evaluation` section.

    Attributes:
        episodes: episodes of the evaluation at the end of a run.
        every: environment steps between evaluations during the run; 0 for none.
        episodes_during: episodes of each evaluation during the run, with different seeds.
        keep_best: use the model with the best evaluation during the run as the run's final model;
            otherwise, and without evaluations during the run, use the last one.
        num_envs: environments that run in parallel.
        max_steps: actions after which an episode is cut off, if the environment has no shorter
            time limit.
        deterministic: use the mode of the policy instead of samples.
        seed: seed of the evaluation environments, which training never uses.
        videos: show an episode of about ten evaluations of a run, and of its final model. "auto"
            does so where observations have an image; true renders any environment.
        decisions: random action sequences that each evaluation environment executes from one state,
            to find out whether the model ranks them correctly (docs/inspecting.md); 0 for none.
    """

    episodes: int = 20
    every: int = 0
    episodes_during: int = 10
    keep_best: bool = True
    num_envs: int = 10
    max_steps: int = 100_000
    deterministic: bool = True
    seed: int = 1_000_003
    videos: bool | str = "auto"
    decisions: int = 6

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        names = ("episodes", "episodes_during", "num_envs", "max_steps")
        require_positive(**{name: getattr(self, name) for name in names})
        most = min(self.num_envs, max(self.episodes, self.episodes_during))
        require_memory(ENV_BYTES * most, f"num_envs={self.num_envs}")
        require(self.every >= 0, "every", self.every, "at least 0")
        require(self.decisions >= 0, "decisions", self.decisions, "at least 0")
        require(0 <= self.seed < 2**32, "seed", self.seed, f"from 0 to {2**32 - 1}")
        known = self.videos in (True, False, "auto")
        require(known, "videos", self.videos, "auto, true or false")


@dataclass
class CheckpointConfig:
    """When a run is saved: the `checkpoint` section.

    Attributes:
        every: time or updates between two checkpoints, for example "10min" or "500updates".
    """

    every: str = "10min"

    def __post_init__(self) -> None:
        """Raise ValueError for an interval that cannot be parsed."""
        parse_interval(self.every)


def parse_interval(every: str) -> tuple[float, int]:
    """Return (minutes, updates) of an interval such as "10 minutes" or "500 updates".

    The unit that is not given is infinite minutes or 0 updates.

    Raises:
        ValueError: `every` is neither.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(minutes?|min|updates?)\s*", str(every))
    in_updates = match is not None and match[2][0] == "u"
    if match is None or not float(match[1]) or (in_updates and "." in match[1]):
        raise ValueError(
            f"every is {every!r}; expected a time or a whole number of updates, such as "
            "checkpoint.every=10min or checkpoint.every=500updates"
        )
    return (math.inf, int(match[1])) if in_updates else (float(match[1]), 0)


@dataclass
class EnvConfig:
    """How environments are made and run; the keys that every choice of the `env` section has.

    Attributes:
        num_envs: environments from which a run collects.
        workers: processes that step them; 0 steps them in this process, "auto" measures which is
            faster.
        timeout: seconds after which a worker that does not answer is restarted, and a step in this
            process is an error.
        obs: regular expressions: which keys of dict observations to `keep`, and which to treat as
            an `image` or a `vector`.
        image_size: width and height to which images are resized; None keeps their size.
        pixels: observe the rendered image; None leaves it to a custom environment.
        frame_stack: latest images observed at once; None for 1.
        action_repeat: environment steps per action; None for the environment's default.
        time_limit: environment steps per episode; None for the environment's own limit.
    """

    num_envs: int = 4
    workers: int | str = "auto"
    timeout: float = SECONDS
    obs: dict[str, str | None] | None = None
    image_size: int | None = None
    pixels: bool | None = None
    frame_stack: int | None = None
    action_repeat: int | None = None
    time_limit: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no environment can have."""
        for name in ("num_envs", "image_size", "frame_stack", "action_repeat", "time_limit"):
            value = getattr(self, name)
            off = "" if name == "num_envs" else ", or null"
            require(value is None or value >= 1, name, value, f"at least 1{off}")
        observation = max(4, 3 * (self.image_size or 0) ** 2) * (self.frame_stack or 1)
        text = f"num_envs={self.num_envs}, image_size={self.image_size}, frame_stack="
        require_memory(self.num_envs * (ENV_BYTES + observation), f"{text}{self.frame_stack}")
        if isinstance(self.workers, int):
            size = WORKER_BYTES * min(self.workers, self.num_envs)
            require_memory(size, f"workers={self.workers}")
        known = self.workers == "auto" or (isinstance(self.workers, int) and self.workers >= 0)
        require(known, "workers", self.workers, "auto, or at least 0")
        require(self.timeout > 0, "timeout", self.timeout, "seconds, above 0")
        for key, pattern in (self.obs or {}).items():
            ok = pattern is None or isinstance(pattern, str)
            require(ok, f"obs.{key}", pattern, "a regular expression, or null")
            known = key in ("keep", "image", "vector")
            require(known, "obs", f"{{{key}: ...}}", "the keys keep, image and vector")


@dataclass
class DataConfig:
    """Where training data comes from and how it is kept; the `data` section.

    Attributes:
        path: recorded episodes to train on, or the id of a Minari dataset; None collects.
        capacity: environment steps in the replay, or memory such as "2GB"; None for all of `path`.
        storage: "ram", or "memmap" to keep images and latents in files.
        across_episodes: sequences continue into the next episode.
        online_queue: train on new steps once, soon after they are collected.
        draw_by: what is drawn uniformly: a "start" position, or an "episode" and then a start in
            it, so that short episodes are trained on more often (official TD-MPC2).
        finished_episodes: train on an episode only once it has ended (official TD-MPC2).
        overlap: collect while the trainer works; such runs are not reproducible bit for bit.
        episode_length: steps per episode of HDF5 files that do not tell where episodes end.
    """

    path: str | None = None
    capacity: Any = 1_000_000
    storage: str = "ram"
    across_episodes: bool = True
    online_queue: bool = True
    draw_by: str = "start"
    finished_episodes: bool = False
    overlap: bool = False
    episode_length: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no replay can have."""
        capacity = self.capacity
        ok = capacity is None or isinstance(capacity, str)
        if isinstance(capacity, int | float) and not isinstance(capacity, bool):
            ok = math.isfinite(capacity) and capacity >= 1
        require(ok, "capacity", capacity, "steps such as 100000, or memory such as 2GB")
        length = self.episode_length
        ok = length is None or length >= 1
        require(ok, "episode_length", length, "at least 1, or null if the file tells it")
        require(self.storage in ("ram", "memmap"), "storage", self.storage, "ram or memmap")
        # Datasets have no online queue.
        queue = self.online_queue and self.path is None
        require_drawing(self.draw_by, self.across_episodes, queue)


def _require_size(name: str, value: float, alternative: str) -> None:
    require(0 < value < math.inf, name, value, f"a finite number above 0{alternative}")
