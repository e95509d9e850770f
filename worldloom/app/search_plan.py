"""What the command line of a search asks for: its space, its other overrides, and its runs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worldloom.app.command_line import USER_ERRORS, explain_error
from worldloom.app.compose import SWEEPS, key_of
from worldloom.app.hints import FLAGS
from worldloom.app.search_config import SearchConfig
from worldloom.app.search_space import format_override
from worldloom.app.sweep_jobs import Job
from worldloom.app.sweep_names import name_run, parse_overrides, text_of

# Overrides of the search and of its folder; its runs have the others.
OF_SEARCH = re.compile(r"(search|sweep|folder)$|search\.|hydra[./]")


class SearchPlan:
    """The runs of a search.

    combinations: for each run of a trial its overrides, from Hydra's sweeper.
    make_job: composes and validates a run: (folder of the search, name, what differs, overrides).
    """

    def __init__(
        self,
        settings: SearchConfig,
        path: Path,
        task: Sequence[str],
        combinations: Sequence[Sequence[str]],
        make_job: Callable[[Path, str, dict[str, Any], list[str]], Job],
    ) -> None:
        self.settings, self.path, self.make_job = settings, path, make_job
        self.space = settings.parse_space()
        parts = parse_overrides(task)
        self.swept = [part.key_or_group for part in parts if part.is_sweep_override()]
        given = {part.key_or_group: text_of(part) for part in parts}
        if both := self.space.keys() & given.keys():
            raise ValueError(
                f"{min(both)} is in search.space, but {min(both)}={given[min(both)]} was given; "
                f"leave it out, or remove it from the space: '~search.space.{min(both)}'"
            )
        self.fixed = {**given, **settings.describe()}
        self.combinations = [
            [word for word in words if not OF_SEARCH.match(key_of(word))] for words in combinations
        ]
        if len({*map(tuple, self.combinations)}) < len(self.combinations):
            raise ValueError(f"{', '.join(self.swept)} has a value twice; give each value once")

    def make_jobs(self, trial: int, values: dict[str, Any]) -> list[Job]:
        """Return the runs of a trial.

        Raises:
            ValueError: a run with these values is not valid.
        """
        return [self._make(f"trial{trial}", values, words) for words in self.combinations]

    def _make(self, name: str, values: dict[str, Any], words: list[str]) -> Job:
        parts = {part.key_or_group: part for part in parse_overrides(words)}
        swept = {key: parts[key] for key in self.swept}
        if swept:
            name += f"-{name_run({key: text_of(part) for key, part in swept.items()})}"
        differs = values | {key: part.value() for key, part in swept.items()}
        drawn = [f"{key}={format_override(value)}" for key, value in values.items()]
        job = self.make_job(self.path, name, differs, [*words, *drawn])
        job.metric = self.settings.metric
        return job

    def validate(self) -> None:
        """Raise ValueError if a run is not valid at an end of the space, or with a choice.

        The other settings are then at their first end.
        """
        ends = {key: part.ends() for key, part in self.space.items()}
        for key in ends:  # known at all
            self._check({key: ends[key][0]}, self.combinations[0])
        first = {key: values[0] for key, values in ends.items()}
        job = self._check(first, self.combinations[0])
        for words in self.combinations[1:]:
            self._check(first, words)
        self._check({key: values[-1] for key, values in ends.items()}, self.combinations[0])
        for key, values in ends.items():
            for value in values[1:] if len(ends) > 1 else values[1:-1]:
                self._check({**first, key: value}, self.combinations[0])
        env, every = job.cfg.env, job.cfg.evaluation.every
        if env.get("_target_") is None and not env.get("from_data"):
            raise ValueError(
                "a search compares scores, but env=none gives none; name an environment: env=…"
            )
        if self.settings.pruner is not None and not every:
            raise ValueError(
                f"search.pruner is {self.settings.pruner!r}, which needs evaluations during the "
                "runs, but evaluation.every is 0; add the environment steps between them: "
                f"evaluation.every={max(1, job.cfg.training.total_steps // 10)}"
            )

    def _check(self, values: dict[str, Any], words: list[str]) -> Job:
        try:
            return self._make("trial", values, words)
        except USER_ERRORS as error:
            drawn = " ".join(f"{key}={format_override(value)}" for key, value in values.items())
            raise ValueError(f"search.space, with {drawn}: {explain_error(error)}") from error

    def describe(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return what the folder of the search records about it.

        arguments: of the command line.
        """
        before = ["", *arguments]
        words = [
            arg
            for arg, previous in zip(arguments, before, strict=False)
            if arg not in SWEEPS
            and (FLAGS.get(previous) or not OF_SEARCH.match(key_of(arg)))
            and key_of(arg) not in (*self.swept, "seed")
        ]
        seeds = [str(job) for job in self._seeds()]
        return {"metric": self.settings.metric, "command": words, "seeds": seeds}

    def _seeds(self) -> list[int]:
        """Return five seeds that the trials do not use."""
        used = set()
        for words in self.combinations:
            given = [part.value() for part in parse_overrides(words) if part.key_or_group == "seed"]
            used.add(given[-1] if given else 0)
        return [seed for seed in range(len(used) + 5) if seed not in used][:5]
