"""Write a policy to a file that runs without worldloom: `worldloom export RUN policy.onnx`.

usage: worldloom export RUN FILE.onnx|FILE.pt2 [policy=prior] [deterministic=true] [batch=1]
       [steps=20] [seed=0] [env.KEY=VALUE …] [model._target_=my_pkg.MyModel]

FILE.onnx runs in ONNX Runtime, without PyTorch; FILE.pt2 with torch.export.load. The graph takes an
observation as the run's environment returns it, the memory that the previous call returned, and
random numbers. It returns an action as the environment accepts it, and the next memory. Names,
shapes and meanings are in the metadata of the file (docs/export.md).

RUN is the folder of a run, a checkpoint or a saved model. Observations and actions of a model
without a run are those of the model, unless env=… names an environment.

policy=prior exports the policy prior of a TD-MPC2, which plans otherwise. batch is the number of
environments in each call. Before the file is written, the graph acts for `steps` steps next to the
model, with the same random numbers; if its actions differ, nothing is written. For a custom model
or environment, repeat the override that named it for training.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides, names_env
from worldloom.app.hints import hint_run
from worldloom.app.run_dir import CONFIG, describes_run, find_run
from worldloom.errors import require, require_positive

SUFFIXES = (".onnx", ".pt2")


@dataclass
class ExportConfig:
    """What to export; the usage describes the settings."""

    policy: str | None = None
    deterministic: bool = True
    batch: int = 1
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        require_positive(batch=self.batch)
        require(self.steps >= 4, "steps", self.steps, "at least 4")
        require(0 <= self.seed < 2**32, "seed", self.seed, f"from 0 to {2**32 - 1}")
        require(self.policy in (None, "prior"), "policy", self.policy, "prior, or leave it out")


def split_paths(args: Sequence[str]) -> tuple[Path, Path, list[str]]:
    """Separate the run and the file on a command line from the KEY=VALUE settings.

    Raises:
        ValueError: there are not two paths, or the file cannot be one of an export.
    """
    settings = [arg for arg in args if re.match(r"[A-Za-z_]\w*=", arg)]
    paths = [arg for arg in args if arg not in settings]
    if len(paths) != 2:
        raise ValueError(
            f"{len(paths)} paths were given; expected a run and a file: worldloom export "
            f"{hint_run(args)} policy.onnx"
        )
    run, file = (Path(path).expanduser() for path in paths)
    require(file.suffix in SUFFIXES, "the file", str(file), "a name that ends in .onnx or .pt2")
    require(file.parent.is_dir(), "the file", str(file), "a file in a folder that exists")
    require(not file.is_dir(), "the file", str(file), "the name of a file, not of a folder")
    return run, file, settings


def export_command(overrides: Overrides) -> None:
    """Export a policy as the command line describes, and print what the file contains."""
    from worldloom.app.build import prepare_process
    from worldloom.app.task import open_saved_run
    from worldloom.export.policy import export_policy, from_model, from_run

    args, config_overrides = split_settings(overrides)
    path, file, args = split_paths(args)
    has_run = describes_run(find_run(path) / CONFIG) or not path.exists()
    config: dict[str, Any] = {}
    if has_run or names_env(config_overrides):
        config, section = open_saved_run(path, config_overrides)
    known = {k: v for k, v in config.get("evaluation", {}).items() if k == "deterministic"}
    settings = parse_settings(args, ExportConfig, **known)
    prepare_process(settings.seed, config.get("threads"))
    if not config or section["_target_"] is None:
        policy = from_model(path, config_overrides, settings)
    else:
        policy = from_run(path, config, section, settings)
    print(export_policy(policy, file, settings))


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), export_command)


if __name__ == "__main__":
    main()
