"""Scores of an actor in the environments of a task, and of each task of several."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from worldloom.acting import (
    Actor,
    Record,
    Watch,
    evaluate,
    evaluation_mode,
    in_step,
    share_episodes,
    use_seed,
)
from worldloom.app.task import Task
from worldloom.app.videos import ForecastingActor, Videos
from worldloom.envs.contract import explain_exception, report_once
from worldloom.envs.film import Film
from worldloom.envs.vector import RowStream
from worldloom.model_scores.decisions import DecisionTest
from worldloom.model_scores.model import average_scores
from worldloom.ranks import Ranks
from worldloom.training.config import EvaluationConfig

LOG_INTERVAL = 20.0  # seconds between two lines about a long evaluation


class Evaluator:
    """Scores an actor in its own environments.

    ranks: the other processes of a run, which share the episodes and return the same scores.
    stops: returns whether this process asks to stop; called after every step.
    say: prints lines about the progress.
    videos: records evaluations of a run; None to record none.
    """

    def __init__(
        self,
        task: Task,
        actor: Actor,
        settings: Mapping[str, Any],
        ranks: Ranks | None = None,
        stops: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
        videos: Videos | None = None,
    ) -> None:
        self.task, self.actor, self.settings = task, actor, settings
        self.ranks, self.stops, self.say = ranks or Ranks(), stops, say
        self.videos = videos

    def score_unfinished(self) -> dict[str, float]:
        """Score an unfinished run, with other seeds than the final evaluation."""
        return self(self.settings["episodes_during"], self.settings["seed"] + 1_000_000)

    def __call__(
        self,
        episodes: int,
        seed: int | None = None,
        film: Film | None = None,
        record: Record | None = None,
    ) -> dict[str, float]:
        """Return the means "return", "length" and, if known, "success", and "return_std".

        With several tasks each is scored in `episodes` episodes. The means are those of all, and
        "TASK/return" and so on those of each; "TASK/score" and "normalized_score", their mean, are
        from 0 to 100 (`TaskChoice.normalize`). Tasks without a simulator are left out.
        "imagination/decision_loss" and "imagination/decision_loss_random" are included if the
        environments can be replayed (`DecisionTest`).

        film: records the episodes of the first environment. record: called with all rows.

        Raises:
            EvaluationStopped: a process asked to stop.
        """
        # Environment i has the same seed, task and episodes, whichever rank runs it.
        tasks = 1 if self.task.tasks is None else len(self.task.tasks.playable)
        size = self.ranks.size
        count = min(max(self.settings["num_envs"] // tasks, 1, -(-size // tasks)), episodes)
        shares = [n for n in share_episodes(episodes, count) for _ in range(tasks)]
        first, end = (rank * len(shares) // size for rank in (self.ranks.rank, self.ranks.rank + 1))
        most = self.settings.get("max_steps", EvaluationConfig.max_steps)  # the first runs lack it
        env = self.task.vector_env(most, first, num_envs=end - first) if end > first else None
        seed = (self.settings["seed"] if seed is None else seed) + first
        videos = None if self.videos is None else self.videos.record(self.actor, first, end, seed)
        actor = videos.actor if videos else self.actor
        try:
            with evaluation_mode(self.actor.model):
                if film is not None and env is not None:
                    film.record(env, shares[first])
                    actor = forecasting = ForecastingActor(self.actor, 1)
                    film.predict = lambda: float(forecasting.predicted[0])
                results = evaluate(
                    actor,
                    env,
                    self.task.obs,
                    self.task.actions,
                    shares[first:end],
                    seed,
                    self.settings["deterministic"],
                    self.ranks,
                    self._watch(sum(shares[first:end])),
                    videos or record,
                )
                decisions = self._score_decisions(env, seed, first)
        finally:
            if env is not None:
                env.close()
        cut = sum(result["length"] >= most for result in results)
        if cut and self.ranks.rank == 0 and (self.task.episode_length or math.inf) > most:
            self.say(
                f"{cut} of the {len(results)} evaluated episodes were cut off after {most:,} steps "
                "(evaluation.max_steps), and their returns are those up to there"
            )
        return average(results) | self._score_tasks(results, shares) | decisions

    def _score_decisions(self, env: Any, seed: int, first: int) -> dict[str, float]:
        """Return the scores of decisions in environments that can be replayed, or {}.

        env: the environments of this rank, from number `first` on; None if it has none.
        """
        candidates = self.settings.get("decisions", EvaluationConfig.decisions)
        if self.videos is not None and not self.videos.one_of_ten:
            candidates = 0
        test: DecisionTest | None = None
        steps: Iterator[bool] = iter(())
        if candidates and env is not None:
            rows = RowStream(env, self.task.obs, self.task.actions)
            masks = None
            if self.task.tasks is not None:
                masks = self.task.tasks.action_masks(self.task.find_tasks(first, env.num_envs))
            deterministic = self.settings["deterministic"]
            test = DecisionTest(self.actor, rows, candidates, seed, deterministic, masks)
            steps = test.run()
        with use_seed(seed, self.actor.device):
            for _ in in_step(steps, self.ranks, self.stops):
                pass
        if test is not None and test.error is not None:
            report_once(
                [("decisions", f"decisions are not scored: {explain_exception(test.error)}")]
            )
        mine = [] if test is None else [decision.score() for decision in test.decisions]
        found = [score for scores in self.ranks.gather(mine) for score in scores]
        return {f"imagination/{name}": mean for name, mean in average_scores(found).items()}

    def _score_tasks(
        self, results: Sequence[dict[str, float]], shares: Sequence[int]
    ) -> dict[str, float]:
        """Return the scores of each task; {} if there is only one.

        shares: how many of the results are those of each environment.
        """
        choices = [choice for choice in self.task.choices if choice.info is None]
        normalized: list[float] = []
        scores: dict[str, float] = {}
        numbers = [i % len(choices) for i, n in enumerate(shares) for _ in range(n) if choices]
        for number, choice in enumerate(choices):
            pairs = zip(results, numbers, strict=True)
            found = average([result for result, of in pairs if of == number])
            if (score := choice.normalize(found)) is not None:
                found["score"] = score
                normalized.append(score)
            scores |= {f"{choice.name}/{name}": value for name, value in found.items()}
        if choices and len(normalized) == len(choices):
            scores["normalized_score"] = float(np.mean(normalized))
        return scores

    def _watch(self, episodes: int) -> Watch:
        """Return a function that prints a line from time to time, and whether to stop."""
        start = last = time.monotonic()

        def watch(ended: int, steps: int) -> bool:
            nonlocal last
            now = time.monotonic()
            if self.ranks.rank == 0 and now >= last + LOG_INTERVAL:
                last = now
                self.say(
                    f"evaluating: {ended} of {episodes} episodes | {steps:,} steps | "
                    f"{steps / max(now - start, 1e-9):,.0f} steps/s"
                )
            return self.stops()

        return watch


def average(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value over the episodes that have it, and "return_std"."""
    names = sorted({name for result in results for name in result})
    scores = {n: float(np.mean([result[n] for result in results if n in result])) for n in names}
    scores["return_std"] = float(np.std([result["return"] for result in results]))
    return scores
