"""Presets: one YAML file each under conf/model, read by the factory and by the command alike."""

import functools
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldloom.errors import suggest


def config_dir() -> Path:
    """Return the folder of configurations: in the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no conf/ in or beside {package}; the installation is incomplete")


def preset_names() -> list[str]:
    """Return all presets by their public names, such as "dreamerv3:size12m", by size."""
    files = [f for f in _model_files() if f.stem not in aliases()]
    return [_public(f.stem) for f in sorted(files, key=_size)]


@functools.cache
def aliases() -> dict[str, str]:
    """Return the aliases, {alias: preset}: files that hold nothing but another preset."""
    found = {}
    for file in _model_files():
        config = OmegaConf.load(file)
        assert isinstance(config, DictConfig)
        if list(config) == ["defaults"]:
            found[file.stem] = _public(str(config.defaults[0]))
    return found


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset's configuration by public name, file name or alias.

    Raises:
        ValueError: no such preset; names the nearest ones.
    """
    known = {_public(f.stem): f for f in _model_files()}
    key = _public(name.lower())
    if key not in known:
        raise ValueError(
            f"unknown model {name!r}{suggest(name, [*known])}; presets: "
            f"{', '.join(preset_names())}; aliases: "
            + ", ".join(f"{a} -> {p}" for a, p in aliases().items())
            + "; or the path of a saved model"
        )
    config = _compose(known[key])
    result = OmegaConf.to_container(config, resolve=True)
    assert isinstance(result, dict)
    return {str(k): v for k, v in result.items()}


def read_choice(file: Path) -> dict[str, Any]:
    """Return what a file of a group holds with its defaults, interpolations as they stand."""
    held: Any = OmegaConf.to_container(_compose(file))
    return held


def describe_preset(name: str) -> str:
    """Return the first comment line of a preset's file."""
    known = {_public(f.stem): f for f in _model_files()}
    return known[name].read_text().splitlines()[0].removeprefix("# ")


def _model_files() -> list[Path]:
    files = (config_dir() / "model").glob("*.yaml")
    return [f for f in sorted(files) if not f.stem.endswith("_base") and f.stem != "custom"]


def file_name(name: str) -> str:
    """Return what the command line calls a preset or an alias: "dreamerv3_size12m"."""
    return name.lower().replace(":", "_", 1)


def _public(stem: str) -> str:
    return stem.replace("_", ":", 1)


def _size(file: Path) -> tuple[str, float]:
    family, _, size = file.stem.partition("_")
    number = "".join(c for c in size if c.isdigit() or c == ".")
    return family, float(number) if number else float("inf")


def _compose(file: Path) -> DictConfig:
    """Merge a file with its defaults, as Hydra does within one group."""
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    merged: Any = OmegaConf.create()
    entries = config.pop("defaults", [])
    for entry in entries:
        # "override /training…: x" says how a family is trained; only the command line reads it.
        # "default" of training and evaluation is no file but a class.
        if isinstance(entry, str) and entry not in ("_self_", "default"):
            merged = OmegaConf.merge(merged, _compose(file.parent / f"{entry}.yaml"))
    merged = OmegaConf.merge(merged, config)
    return merged
