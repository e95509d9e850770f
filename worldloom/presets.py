"""Presets of models: YAML files in conf/model, read by the factory and by the commands."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldloom.errors import require, require_computable, suggest

# Ranges of hyperparameters: counts, shares, and numbers that divide or whose logarithm is taken.
COUNTS = (
    *("units", "depth", "deter", "hidden", "stoch", "classes", "blocks", "imag_length", "kernel"),
    *("enc_dim", "mlp_dim", "latent_dim", "num_channels", "num_enc_layers", "num_bins"),
    *("simnorm_dim", "horizon", "iterations", "num_samples", "num_elites"),
)
SHARES = ("unimix", "rate", "lam", "dropout", "rho", "tau")
SPREADS = ("minstd", "maxstd", "min_std", "max_std")


# Folder of the user's own choices, of --config-dir.
extra_dirs: list[Path] = []


def config_dir() -> Path:
    """Return the configuration folder: inside the package if installed, next to it in a clone."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no conf/ in or next to {package}; the installation is incomplete: install worldloom again"
    )


def choice_files(group: str) -> dict[str, Path]:
    """Return the files of a group by name: worldloom's, and those in the folder of --config-dir.

    Those in a folder of the group, such as "dreamerv3/crafter", follow the others.
    """
    files = {
        file.relative_to(root / group).with_suffix("").as_posix(): file
        for root in (config_dir(), *extra_dirs)
        for file in (root / group).rglob("*.yaml")
    }
    return dict(sorted(files.items(), key=lambda item: ("/" in item[0], item[0])))


def preset_names() -> list[str]:
    """Return the public names of all presets, such as "dreamerv3:size12m", sorted by size."""
    return sorted((name for name in _find_files() if name not in aliases()), key=_parse_size)


@functools.cache
def aliases() -> dict[str, str]:
    """Return {alias: preset}; an alias is a file that only names a preset in its defaults."""
    configs: dict[str, Any] = {name: OmegaConf.load(file) for name, file in _find_files().items()}
    return {
        name: _to_public(str(config.defaults[0]))
        for name, config in configs.items()
        if list(config) == ["defaults"] and len(config.defaults) == 1
    }


def family_name(choice: str) -> str | None:
    """Return the family, such as "dreamerv3", of a preset or an alias; None for other models."""
    public = aliases().get(_to_public(choice), _to_public(choice))
    return public.partition(":")[0] if public in preset_names() else None


def load_preset(name: str) -> dict[str, Any]:
    """Return a preset's configuration by public name, file name or alias.

    Raises:
        ValueError: there is no such preset; the message suggests a similar name.
    """
    files = _find_files()
    if (key := _to_public(name.lower())) not in files:
        raise ValueError(
            f"unknown model {name!r}{suggest(name, files)}; presets: "
            f"{', '.join(preset_names())}; aliases: "
            + ", ".join(f"{a} -> {p}" for a, p in aliases().items())
            + "; or the path of a saved model"
        )
    config: Any = OmegaConf.to_container(_compose(files[key]), resolve=True)
    return {str(k): v for k, v in config.items()}


def override_preset(
    config: dict[str, Any],
    overrides: Mapping[str, Any],
    name: str,
    own: Mapping[str, Any] | None = None,
    within: str = "",
) -> dict[str, Any]:
    """Return a preset's configuration with overrides merged in.

    own: {name: default} of the hyperparameters that a subclass adds to the preset's, None for a
        class of worldloom. A subclass may also have further names in `loss_scales`, and so may a
        model with another `representation` than a decoder.
    within: prefix of the names of hyperparameters in messages, such as "encoder.".

    Raises:
        ValueError: an override is unknown, or has another type or range than the preset's value.
    """
    merged, added = dict(config), own or {}
    # The representation first: it decides which weights of losses there are.
    for key, value in sorted(overrides.items(), key=lambda item: item[0] != "representation"):
        if key in added:
            _require_kind(within + key, value, added[key])
            merged[key] = value
            continue
        if key not in config:
            choices = [k for k in (*config, *added) if not k.startswith("_")]
            raise ValueError(
                f"{name} has no hyperparameter {within + key!r}"
                f"{suggest(key, choices, within)}; it takes {', '.join(choices)}"
            )
        old = config[key]
        if key == "representation":
            merged[key] = _replace_representation(value, old)
            continue
        if key == "decoder" and isinstance(value, bool) and isinstance(old, dict):
            merged[key] = value
            continue
        if not isinstance(old, dict) or key == "obs_classes":
            _require_fits(key, value, old, within)
            merged[key] = value
            continue
        if not isinstance(value, Mapping):
            raise ValueError(
                f"hyperparameter {within + key!r} is {value!r}; expected a dict with some of "
                f"{sorted(old)}"
            )
        # Each part may have units and depth of its own.
        shared: dict[str, Any] = {k: config[k] for k in ("units", "depth") if k in config}
        free = own is not None or merged.get("representation", "decoder") != "decoder"
        terms = free and key == "loss_scales"
        further = {k: 1.0 for k in value if k not in old} if terms else None
        part = override_preset({**shared, **old}, value, name, further, f"{within}{key}.")
        merged[key] = {k: v for k, v in part.items() if k in old or k in value}
    return merged


def _replace_representation(value: Any, old: Any) -> Any:
    """Return the new `representation`: a name, or a dict with name or _target_, and its options.

    A dict without name and _target_ changes options of the old one. The model checks the rest.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(
            f"hyperparameter 'representation' is {value!r}; expected a name such as decoder, or a "
            "dict with name or _target_, and its hyperparameters"
        )
    kept = {"name": old} if isinstance(old, str) else old
    return dict(value) if {"name", "_target_"} & value.keys() else {**kept, **value}


def _require_fits(key: str, value: Any, old: Any, within: str) -> None:
    """Raise ValueError unless a value has the type of the preset's value and is in range."""
    _require_kind(within + key, value, old)
    name = f"hyperparameter {within + key!r}"
    require(key not in SHARES or 0 <= value <= 1, name, value, "a number in [0, 1]")
    require(key not in COUNTS or value >= 1, name, value, "at least 1")
    require(key not in SPREADS or value > 0, name, value, "a number above 0")


def _require_kind(key: str, value: Any, old: Any) -> None:
    """Raise ValueError unless a value has the type of another one, and is a finite number."""
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
    kinds |= {list: (list, tuple), tuple: (list, tuple)}
    types, name = kinds.get(type(old), (object,)), f"hyperparameter {key!r}"
    holds = isinstance(value, types) and (bool in types or value is not True)
    require(holds or types == (object,), name, value, f"{type(old).__name__} such as {old!r}")
    if isinstance(value, float):
        require(math.isfinite(value), name, value, f"a finite number such as {old!r}")
    require_computable(name, value)


def read_choice(file: Path) -> dict[str, Any]:
    """Return the contents of a file of a group, merged with its defaults but not resolved."""
    contents: Any = OmegaConf.to_container(_compose(file))
    return contents


def describe_preset(name: str) -> str:
    """Return the first comment line of a preset's file."""
    return _find_files()[name].read_text().splitlines()[0].removeprefix("# ")


def file_name(name: str) -> str:
    """Return the name of a preset or an alias on the command line, such as "dreamerv3_size12m"."""
    return name.lower().replace(":", "_", 1)


def _find_files() -> dict[str, Path]:
    """Return the files of presets and aliases by their public names."""
    files = choice_files("model").items()
    return {
        _to_public(name): file
        for name, file in files
        if not name.endswith("_base") and name != "custom" and "/" not in name
    }


def _to_public(stem: str) -> str:
    """Return the public name of a file: "dreamerv3:size12m" for dreamerv3_size12m."""
    return stem.replace("_", ":", 1)


def _parse_size(name: str) -> tuple[str, float]:
    """Return the family and the size of a preset, to sort by."""
    family, _, size = name.partition(":")
    number = "".join(c for c in size if c.isdigit() or c == ".")
    return family, float(number) if number else float("inf")


@functools.cache
def _compose(file: Path) -> DictConfig:
    """Merge a file with its defaults, as Hydra does within one group; callers do not change it."""
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    merged: Any = OmegaConf.create()
    root = next(root for root in (*extra_dirs, config_dir()) if root in file.parents)
    group = file.relative_to(root).parts[0]
    for entry in config.pop("defaults", []):
        # Entries such as "override /training: x" select how a family is trained, for the commands
        # only. "default" of training and evaluation is a class instead of a file.
        if isinstance(entry, str) and entry not in ("_self_", "default"):
            base = choice_files(group).get(entry.removeprefix(f"/{group}/"))
            merged = OmegaConf.merge(merged, _compose(base or file.with_name(f"{entry}.yaml")))
    merged = OmegaConf.merge(merged, config)
    return merged
