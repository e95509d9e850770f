"""Check an environment before training on it: `python -m worldloom.envs.check env=…`.

usage: python -m worldloom.envs.check env=<suite> [env.KEY=VALUE …] [steps=1000] [seed=0]

Steps the environment with random actions and prints a table of observations (also as models see
them), actions, rewards, episodes, seeds and speed, followed by all problems. Exits with 1 if there
are problems.
"""

import sys
from dataclasses import dataclass

from worldloom.app.compose import readable_errors
from worldloom.app.saved_config import checked, env_section, split_words
from worldloom.app.task import blaming, env_maker
from worldloom.check.environment import EnvProblems, check_env
from worldloom.errors import require_positive


@dataclass
class CheckConfig:
    """Number of steps, and the seed of the first episode."""

    steps: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for less than one step."""
        require_positive(steps=self.steps)


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
