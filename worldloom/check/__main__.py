"""Check an environment before training on it: `python -m worldloom.envs.check env=…`.

usage: python -m worldloom.envs.check env=<suite> [env.KEY=VALUE …] [steps=1000] [seed=0]

Acts at random and prints one table: observations and what a model gets of them, actions, rewards,
ends of episodes, seeds and speed; then every problem found. Exits with 1 if there is one.
"""

import sys
from dataclasses import dataclass

from worldloom.app.compose import readable_errors
from worldloom.app.saved_config import checked, env_section, split_words
from worldloom.app.task import blaming, env_maker
from worldloom.check.environment import EnvProblems, check_env


@dataclass
class CheckConfig:
    """How long to look, and from which seed."""

    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a number of steps that shows nothing."""
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; expected at least 1")


def main() -> None:
    """Run the command line."""
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    with readable_errors():
        given, words = split_words(sys.argv[1:])
        if not words:
            raise ValueError("no environment was named; add env=gymnasium env.id=CartPole-v1")
        how = checked(given, CheckConfig)
        section = env_section(words)
        try:
            with blaming(section["_target_"]):
                print(check_env(env_maker(section), **vars(how), **(section.get("obs") or {})))
        except EnvProblems as found:
            print(found)
            sys.exit(1)


if __name__ == "__main__":
    main()
