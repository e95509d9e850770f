"""Check an environment before training on it: `worldloom check env=…`.

usage: worldloom check env=<suite> [env.KEY=VALUE …] [steps=1000] [seed=0]

Steps the environment with random actions and prints a table of observations (also as models see
them), actions, rewards, episodes, seeds and speed, followed by all problems. Exits with 1 if there
are problems.
"""

import sys
from dataclasses import dataclass

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides, compose_env
from worldloom.app.task import env_maker, name_failing_env
from worldloom.check.environment import EnvProblems, check_env
from worldloom.envs.suites.multitask import TaskSet
from worldloom.envs.time_limit import SECONDS
from worldloom.errors import require_positive


@dataclass
class CheckConfig:
    """Number of steps, and the seed of the first episode."""

    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for less than one step."""
        require_positive(steps=self.steps)


def check_command(overrides: Overrides) -> None:
    """Check an environment as the command line describes; exit with 1 if there are problems."""
    args, env_overrides = split_settings(overrides)
    if not env_overrides.args:
        raise ValueError("no environment was named; add env=gymnasium env.id=CartPole-v1")
    settings = parse_settings(args, CheckConfig)
    section = compose_env(env_overrides)
    try:
        with name_failing_env(section["_target_"]):
            make, choice = env_maker(section), section.get("obs") or {}
            options = {**vars(settings), "timeout": section.get("timeout", SECONDS)}
            if not isinstance(make, TaskSet):
                print(check_env(make, **options, **choice))
                return
            for task in make.playable:  # which have made the choice of observations
                print(f"{make.names[task]}:")
                print(check_env(make.maker(task), **options))
    except EnvProblems as found:
        print(found)
        sys.exit(1)


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), check_command)


if __name__ == "__main__":
    main()
