"""The command `worldloom view`: a page that plays what a model sees, imagines and plans.

usage: worldloom view RUN [episodes=2] [max_steps=500] [horizon=50] [every=…] [out=….html]
       [seed=…] [deterministic=…] [render=true] [device=cpu] [env.KEY=VALUE …]
       [model._target_=my_pkg.MyModel] [--serve] [port=…]

Plays evaluation episodes of the run's model in its own environment, which its config.yaml
describes, and writes one HTML file, by default RUN/playback.html. It needs no network and no other
file, and opens by a double click: episodes step by step, observations next to what the model
imagines from any step on with the episode's own actions, rewards, values, errors, latents, and the
plans of a model that plans.

horizon is the number of imagined steps. every=1 imagines from every step; by default from as many
steps as keep the file below 5 MB. render=false leaves out pictures of the environment, which are
shown where the model observes no image. For a custom model or environment, repeat the override that
named it for training.

--serve writes no file. It serves a page on 127.0.0.1, on a free port unless port= names one, in
which you act inside the model from any step of the episodes.
"""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides
from worldloom.app.hints import hint_run
from worldloom.errors import require, require_positive


@dataclass
class ViewConfig:
    """What to record; the usage describes the settings."""

    episodes: int = 2
    max_steps: int = 500
    horizon: int = 50
    every: int | None = None
    out: str | None = None
    seed: int = 0
    deterministic: bool = True
    render: bool = True
    device: str = "cpu"
    serve: bool = False
    port: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        require_positive(
            episodes=self.episodes,
            max_steps=self.max_steps,
            horizon=self.horizon,
            every=self.every or 1,
        )
        require(self.every != 0, "every", self.every, "at least 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, f"from 0 to {2**32 - 1}")
        require(0 <= self.port < 2**16, "port", self.port, f"from 0 to {2**16 - 1}")
        require(self.serve or not self.port, "port", self.port, "0 without --serve")
        if self.out is not None:
            file = Path(self.out).expanduser()
            require(file.suffix == ".html", "out", self.out, "a name that ends in .html")
            require(file.parent.is_dir(), "out", self.out, "a file in a folder that exists")


def split_run(args: list[str]) -> tuple[Path, list[str]]:
    """Separate the run on a command line from its KEY=VALUE settings.

    Raises:
        ValueError: there is no run, or more than one.
    """
    settings = [arg for arg in args if re.match(r"[A-Za-z_]\w*=", arg)]
    runs = [arg for arg in args if arg not in settings]
    if len(runs) != 1:
        held = f"{len(runs)} runs were named" if runs else "no run was named"
        raise ValueError(f"{held}; expected one: worldloom view {hint_run(args)}")
    return Path(runs[0]).expanduser(), settings


def view_command(overrides: Overrides) -> None:
    """Write the page as the command line describes, and print its name; or serve the live one."""
    from worldloom.app.build import prepare_process
    from worldloom.app.task import open_saved_run
    from worldloom.devices import require_device
    from worldloom.view.live import serve_run
    from worldloom.view.playback import write_page

    args, config_overrides = split_settings(overrides)
    path, args = split_run(args)
    config, section = open_saved_run(path, config_overrides)
    known = {
        k: v for k, v in config.get("evaluation", {}).items() if k in ("seed", "deterministic")
    }
    settings = parse_settings(args, ViewConfig, **known)
    if section["_target_"] is None:
        raise ValueError(
            f"{path} was trained without an environment, so there are no episodes to play; name "
            "one that has the observations and actions of its data: env=gymnasium env.id=…"
        )
    device: Any = require_device(settings.device)
    prepare_process(settings.seed, config["threads"])
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    if settings.serve:
        serve_run(path, config, section, settings, device)
    else:
        print(write_page(path, config, section, settings, device))


def main() -> None:
    """Run the command line."""
    sys.argv[1:] = ["serve=true" if arg == "--serve" else arg for arg in sys.argv[1:]]
    run_command(str(__doc__), view_command)


if __name__ == "__main__":
    main()
