"""Videos of the evaluations of a run, with true and predicted rewards below the picture.

Axes in shapes: N environments; A = width of an action; H, W height and width of an image.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.acting import Actor, Memory
from worldloom.app.saved_run import add_render_mode
from worldloom.app.task import Task, env_maker
from worldloom.envs.contract import report_once
from worldloom.envs.film import enlarge, shrink, to_rgb
from worldloom.envs.rerender import render_episode
from worldloom.envs.reward_panel import RewardPanel
from worldloom.envs.suites.multitask import TaskSet
from worldloom.envs.vector import RowStream
from worldloom.files import atomic_write
from worldloom.ranks import Ranks
from worldloom.training.config import EvaluationConfig
from worldloom.training.media import encode, log_pictures

MOST_IMAGES = 150  # of a video; longer episodes show every second, fourth, ... step
MOST_TASKS = 8  # of which a run shows an episode each
VIDEOS_PER_RUN = 10  # about; another one shows the final model


class ForecastingActor(Actor):
    """An actor that also predicts, from the state and the action, the reward of the next step.

    count: number of environments, the first ones, for which it predicts.
    predicted: [count]; NaN if the model cannot predict.
    """

    def __init__(self, actor: Actor, count: int) -> None:
        super().__init__(actor.model, actor.planner, actor.precision)
        self.predicted = np.full(count, math.nan)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Memory]:
        """Choose actions as the actor does; the random numbers that it draws are the same."""
        action, memory = super().__call__(*args, **kwargs)
        if count := len(self.predicted):
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                self.predicted = self._forecast(memory, count)
        return action, memory

    def _forecast(self, memory: Memory, count: int) -> np.ndarray:
        try:
            imagined = self.model.imagine(memory.state[:count], memory.action[None, :count])
            return imagined.rewards[0].reshape(count).float().cpu().numpy()
        except Exception as error:  # a video must not end a run
            _report(error, "videos show no predicted rewards")
            return np.full(count, math.nan)


def _report(error: Exception, effect: str) -> None:
    text = " ".join(f"{effect}: {type(error).__name__}: {error}".split())
    report_once([(effect, f"{text}; the run continues, and this is not reported again")])


@dataclass
class RecordedEpisode:
    """An episode as an evaluation has run it; plain data, which ranks can exchange.

    task: number of its environment, and of its task among those with a simulator.
    seed: of its reset.
    actions: T arrays [A], in model units. rewards, predicted: T numbers.
    images: [H, W, 3] of the steps `shown`, if the observations have an image.
    """

    task: int
    seed: int
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    every: int = 1

    def look(self, image: np.ndarray, is_last: bool) -> None:
        """Keep the image of the current step, if it is due."""
        step = len(self.rewards)
        if step % self.every and not is_last:
            return
        self.images.append(image)
        self.shown.append(step)
        if len(self.images) > MOST_IMAGES:
            self.every *= 2
            kept = [i for i, at in enumerate(self.shown) if at % self.every == 0 or at == step]
            self.images = [self.images[i] for i in kept]
            self.shown = [self.shown[i] for i in kept]


class EpisodeRecorder:
    """Records the first episode of an evaluation in each of its first environments.

    first: number of this process's first environment. seed: of that environment.
    count: environments to record. image: key of the image that is kept; None for none.
    """

    def __init__(self, actor: Actor, first: int, count: int, seed: int, image: str | None) -> None:
        self.actor = ForecastingActor(actor, count)
        self.episodes = [RecordedEpisode(first + i, seed + i) for i in range(count)]
        self._image = image
        self._ended = [False] * count
        self._expected = self.actor.predicted  # for the next rows

    def __call__(self, rows: RowStream, actions: np.ndarray) -> None:
        """Record the current rows and the actions chosen in them."""
        for i, episode in enumerate(self.episodes):
            starts = not episode.actions
            # The first row of an environment that was replaced ends its recording.
            self._ended[i] |= bool(rows.is_first[i]) != starts
            if self._ended[i]:
                continue
            if not starts:
                episode.rewards.append(float(rows.rewards[i]))
                episode.predicted.append(float(self._expected[i]))
            self._ended[i] = bool(rows.is_last[i])
            if not self._ended[i]:
                episode.actions.append(actions[i].copy())
            if self._image is not None:
                image: Any = rows.obs[self._image] if isinstance(rows.obs, dict) else rows.obs
                episode.look(to_rgb(image[i]), self._ended[i])
        self._expected = self.actor.predicted


class Videos:
    """Videos of a run: recorded by its evaluations, drawn and sent to its loggers afterwards.

    About ten evaluations of a run are shown, and that of the final model. Rank 0 draws; whatever
    fails there is reported once, and the run continues without videos.

    plain: the configuration; environments that render are made from its env section.
    folder: of the run; the videos are also written to its subfolder videos.

    one_of_ten: whether the next evaluation is one of those ten, also if no videos are recorded.
    """

    def __init__(self, task: Task, plain: Mapping[str, Any], folder: Path, ranks: Ranks) -> None:
        self.task, self.env, self.folder, self.ranks = task, plain["env"], folder, ranks
        self.total_steps = plain["training"]["total_steps"]
        mode = plain["evaluation"].get("videos", EvaluationConfig.videos)
        parts = task.obs.parts
        images = [key for key in parts if len(parts[key].shape) == 3]
        self.image = images[0] if images else None
        self.names = [choice.name for choice in task.choices if choice.info is None]
        self.renders = mode is True
        self.enabled = bool(self.renders or (mode == "auto" and images)) and bool(task.make_env)
        self.due, self.one_of_ten = False, True
        self.recorder: EpisodeRecorder | None = None

    def start(self, step: int, every: int) -> None:
        """Decide whether the next evaluation is one of those that show and test more.

        every: steps between evaluations; 0 for the final one.
        """
        interval = max(every, self.total_steps // VIDEOS_PER_RUN, 1)
        self.one_of_ten = not every or step // interval > (step - every) // interval
        self.due, self.recorder = self.enabled and self.one_of_ten, None

    def record(self, actor: Actor, first: int, end: int, seed: int) -> EpisodeRecorder | None:
        """Return what records the evaluation in environments `first` to `end`, if one is due.

        seed: of the first environment.
        """
        if self.due:
            image = None if self.renders else self.image
            count = max(0, min(end, MOST_TASKS, max(1, len(self.names))) - first)
            self.recorder = EpisodeRecorder(actor, first, count, seed, image)
        return self.recorder

    def finish(self, trainer: Any, prefix: str, step: int) -> None:
        """Draw what was recorded; log it as PREFIX/video, or PREFIX/TASK/video; write files."""
        recorder, self.recorder = self.recorder, None
        if recorder is None:
            return
        found = [episode for part in self.ranks.gather(recorder.episodes) for episode in part]
        if self.ranks.rank:
            return
        try:
            videos = {self._name(prefix, e.task): self._draw(e) for e in found}
            log_pictures(trainer, videos, step)
            for name, video in videos.items():
                self.folder.stat()  # a folder that was moved is not made again
                file = self.folder / "videos" / f"{name.replace('/', '_')}_{step:012}.gif"
                file.parent.mkdir(exist_ok=True)
                with atomic_write(file) as stream:
                    stream.write(encode(video))
        except Exception as error:  # of an environment, its renderer, a full disk
            _report(error, "an evaluation has no video")

    def _name(self, prefix: str, task: int) -> str:
        return f"{prefix}/{self.names[task]}/video" if self.names else f"{prefix}/video"

    def _draw(self, episode: RecordedEpisode) -> np.ndarray:
        """Return the video of an episode, [T, H, W, 3] uint8."""
        shown: Iterable[tuple[int, np.ndarray]]
        shown = zip(episode.shown, episode.images, strict=True)
        if self.renders:
            every = max(1, -(-len(episode.rewards) // MOST_IMAGES))
            actions = self.task.actions.decode(np.stack(episode.actions))
            make = self._make_env(episode.task)
            shown = render_episode(make, episode.seed, actions, episode.rewards, every)
        return draw_video(shown, episode.rewards, episode.predicted)

    def _make_env(self, task: int) -> Callable[[], Any]:
        """Return what makes an environment of a task that renders, in another process."""
        if self.task.tasks is None:
            return env_maker(add_render_mode(self.env, "rgb_array"))
        makers = {
            choice.name: choice.info or env_maker(add_render_mode(choice.env, "rgb_array"))
            for choice in self.task.choices
        }
        tasks = TaskSet(makers, self.env.get("obs"))
        tasks.infos = self.task.tasks.infos  # the same; finding out takes time
        return tasks.maker(tasks.playable[task])


def draw_video(
    shown: Iterable[tuple[int, np.ndarray]], rewards: Sequence[float], predicted: Sequence[float]
) -> np.ndarray:
    """Draw (step, image) of an episode with the rewards up to each step below the image.

    Returns [number of images, H, W, 3] uint8.
    """
    panel, drawn, frames = RewardPanel(len(rewards)), 0, []
    for step, image in shown:
        for pair in zip(rewards[drawn:step], predicted[drawn:step], strict=True):
            panel.add(*pair)
        drawn = step
        frames.append(panel.draw(enlarge(shrink(image))))
    return np.stack(frames)
