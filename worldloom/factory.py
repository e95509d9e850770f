"""Build any world model by name: presets, aliases, saved folders, checkpoints, official weights."""

import importlib
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldloom.errors import suggest
from worldloom.presets import aliases, describe_preset, load_preset, preset_names
from worldloom.saving import config_of, load_tensors, read_weights

# The models that a saved configuration may name; anything else must be allowed by the caller.
REGISTERED = {
    "dreamerv3": "worldloom.models.dreamerv3.DreamerV3",
    "tdmpc2": "worldloom.models.tdmpc2.TDMPC2",
}

# Hyperparameters that count something there must be one of.
SIZES = (
    *("units", "depth", "deter", "hidden", "stoch", "classes", "blocks", "imag_length", "kernel"),
    *("enc_dim", "mlp_dim", "latent_dim", "num_channels", "num_enc_layers", "num_bins"),
    *("simnorm_dim", "horizon", "iterations", "num_samples", "num_elites"),
)

# Hyperparameters that are a share of something.
SHARES = ("unimix", "rate", "lam", "dropout", "rho", "tau")

# Hyperparameters that divide, or are taken the logarithm of.
SPREADS = ("minstd", "maxstd", "min_std", "max_std")

ObsShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
ActionDim = int | Sequence[int] | Mapping[str, int]


def create_world_model(
    model: str | Path,
    obs_shape: ObsShape | None = None,
    action_dim: ActionDim | None = None,
    discrete: bool | Mapping[str, bool] | None = None,
    device: str | torch.device = "cpu",
    *,
    allow: Sequence[str] = (),
    **overrides: Any,
) -> Any:
    """Create a world model, or load one.

    Args:
        model: a preset ("dreamerv3:size12m"), an alias ("dreamer"), or a path: a folder written by
            save_pretrained, a run folder, a .ckpt file, or official weights of DreamerV3 (.npz,
            agent.pkl, a checkpoint folder) or TD-MPC2 (.pt).
        obs_shape: shape of one observation, (3, 64, 64) for an image, (4,) for a vector, or a
            dict of such shapes. Saved models know theirs.
        action_dim: number of continuous actions or discrete choices; a sequence of numbers of
            choices for multi-discrete actions. Saved models know theirs.
        discrete: whether actions are one-hot choices; by default continuous in [-1, 1].
        device: where the model lives.
        allow: import paths of models outside worldloom that a saved configuration may name.
        overrides: hyperparameters that replace the preset's own (see conf/model).

    Returns:
        A `WorldModel` that is an nn.Module.

    Raises:
        ValueError: an unknown name or hyperparameter (the nearest valid one is named), a path that
            does not exist, a shape that no encoder takes, an impossible action_dim, or a file
            that cannot be read.
    """
    if _is_path(model):
        built = _load(Path(model), obs_shape, action_dim, discrete, allow, overrides)
    else:
        config = override_preset(load_preset(str(model)), overrides, str(model))
        if obs_shape is None or action_dim is None:
            raise ValueError(
                f"create_world_model({str(model)!r}) needs obs_shape and action_dim, for example "
                "obs_shape=(3, 64, 64), action_dim=4"
            )
        built = build_model(config, obs_shape, action_dim, discrete or False)
    return built.to(device)


def list_models(verbose: bool = False) -> list[str] | dict[str, dict[str, Any]]:
    """Return the names of all presets, or with `verbose` what is known of each.

    Verbose entries hold "description", "parameters" (for (3, 64, 64) images and 6 continuous
    actions), "observations", "actions" and "aliases".
    """
    names = preset_names()
    if not verbose:
        return names
    return {name: _describe(name) for name in names}


def build_model(
    config: Mapping[str, Any],
    obs_shape: ObsShape,
    action_dim: ActionDim,
    discrete: bool | Mapping[str, bool] = False,
) -> nn.Module:
    """Build the class that config["_target_"] names from what the environment knows.

    The class is called as `cls(obs_shape=…, action_dim=…, discrete=…, **rest of config)`.
    """
    options = {k: v for k, v in config.items() if k not in ("_target_", "_partial_")}
    cls = import_target(str(config["_target_"]))
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in parameters and not takes_any:
            raise ValueError(
                f"{cls.__name__} has no hyperparameter {name!r}{suggest(name, parameters)}; it "
                f"takes {', '.join(parameters)}"
            )
    spaces = {
        "obs_shape": _plain(obs_shape),
        "action_dim": _plain(action_dim),
        "discrete": _plain(discrete),
    }
    if lacking := [name for name in spaces if name not in parameters and not takes_any]:
        raise ValueError(
            f"{cls.__name__} does not take {', '.join(lacking)}; models are built as "
            f"{cls.__name__}(obs_shape=…, action_dim=…, discrete=…) and what the configuration "
            "adds; give it these arguments"
        )
    model = cls(**spaces, **options)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{config['_target_']} made a {type(model).__name__}, which is no torch.nn.Module; "
            "expected a world model (worldloom/protocol.py); derive its class from torch.nn.Module"
        )
    if config_of(model) is None:
        made: Any = model
        made.build_config = {"model": config["_target_"], **spaces, **options}
    return model


def _is_path(model: str | Path) -> bool:
    """Tell paths from names: a preset's name has no separator, no suffix and no folder."""
    if isinstance(model, Path) or "/" in model or "\\" in model:
        return True
    if Path(model).suffix in (".ckpt", ".npz", ".pkl", ".pt", ".pth", ".safetensors"):
        return True
    # A preset is meant even where a folder happens to have its name.
    return Path(model).exists() and model not in (*preset_names(), *aliases())


def _load(
    path: Path,
    obs_shape: ObsShape | None,
    action_dim: ActionDim | None,
    discrete: bool | Mapping[str, bool] | None,
    allow: Sequence[str],
    overrides: dict[str, Any],
) -> nn.Module:
    if not path.exists():
        raise ValueError(f"no file or folder {str(path)!r}; check the path, or name a preset")
    if module := official_format(path):
        return _load_official(module, path, obs_shape, action_dim, discrete, overrides)
    if overrides:
        raise ValueError(f"{path} is a saved model; {sorted(overrides)} cannot be changed in it")
    config, tensors = read_weights(path)
    needed = ("model", "obs_shape", "action_dim", "discrete")
    if not isinstance(config, dict) or any(key not in config for key in needed):
        raise ValueError(f"{path} does not say how to build its model; expected {needed} in it")
    config = dict(config)
    target = str(config.pop("model"))
    if target not in REGISTERED and target not in allow:
        raise ValueError(
            f"{path} names the model {target!r}, which is not part of worldloom; if you trust it, "
            f"pass allow=({target!r},)"
        )
    spaces = {k: config.pop(k) for k in ("obs_shape", "action_dim", "discrete")}
    asked = {"obs_shape": obs_shape, "action_dim": action_dim, "discrete": discrete}
    for name, given in asked.items():
        if given is not None and _plain(given) != _plain(spaces[name]):
            raise ValueError(f"{path} was saved with {name}={spaces[name]}, not {given}")
    config["_target_"] = REGISTERED.get(target, target)
    model = build_model(config, **spaces)
    load_tensors(model, tensors, path)
    return model


def official_format(path: Path) -> Any:
    """Return the module that reads the official weights at a path, or None if they are not such."""
    for family in REGISTERED:
        module: Any = importlib.import_module(f"worldloom.models.{family}.official")
        if module.is_official(path):
            return module
    return None


def _load_official(
    module: Any,
    path: Path,
    obs_shape: ObsShape | None,
    action_dim: ActionDim | None,
    discrete: bool | Mapping[str, bool] | None,
    overrides: dict[str, Any],
) -> nn.Module:
    if obs_shape is None or action_dim is None:
        raise ValueError(
            f"official weights do not name their spaces; pass obs_shape and action_dim for {path}"
        )
    arrays = module.read_arrays(path)
    found, sizes = module.arguments_of(arrays, obs_shape, action_dim, overrides)
    if discrete is not None and discrete != found:
        raise ValueError(
            f"discrete={discrete}, but the policy in {path} has "
            f"{'discrete' if found else 'continuous'} actions"
        )
    family = module.__name__.split(".")[-2]
    preset = next(name for name in preset_names() if name.startswith(family))
    config = override_preset(load_preset(preset), sizes, family)
    model: Any = build_model(config, obs_shape, action_dim, found)
    module.load_arrays(model, arrays)
    return model


def override_preset(
    config: dict[str, Any], overrides: Mapping[str, Any], name: str, within: str = ""
) -> dict[str, Any]:
    """Return the preset with overrides merged in; an unknown or mistyped one is refused by name.

    within: what the names of hyperparameters begin with in messages, such as "encoder.".
    """
    merged = dict(config)
    for key, value in overrides.items():
        if key not in config:
            choices = [k for k in config if not k.startswith("_")]
            raise ValueError(
                f"{name} has no hyperparameter {within + key!r}"
                f"{suggest(key, choices, within)}; it takes {', '.join(choices)}"
            )
        old = config[key]
        if isinstance(old, dict) and key != "obs_classes":
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"hyperparameter {within + key!r} is {value!r}; expected a dict with some of "
                    f"{sorted(old)}"
                )
            shared: dict[str, Any] = {k: config[k] for k in ("units", "depth") if k in config}
            part = override_preset({**shared, **old}, value, name, f"{within}{key}.")
            merged[key] = {k: v for k, v in part.items() if k in old or k in value}
        else:
            merged[key] = _typed(key, value, old, within)
    return merged


def _typed(key: str, value: Any, old: Any, within: str) -> Any:
    """Check that a number replaces a number, a flag a flag, a list a list."""
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,), list: (list, tuple)}
    wanted, said = kinds.get(type(old)), f"hyperparameter {within + key!r} is {value!r}"
    if wanted and (not isinstance(value, wanted) or (bool not in wanted and value is True)):
        raise ValueError(f"{said}; expected {type(old).__name__} such as {old!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{said}; expected a finite number such as {old!r}")
    if key in SHARES and not 0 <= value <= 1:
        raise ValueError(f"{said}; expected a number in [0, 1]")
    if key in SIZES and value < 1:
        raise ValueError(f"{said}; expected at least 1")
    if key in SPREADS and not value > 0:
        raise ValueError(f"{said}; expected a number above 0")
    return value


def _describe(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        model: Any = build_model(load_preset(name), (3, 64, 64), 6)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "description": describe_preset(name),
        "parameters": count,
        "observations": model.takes[0],
        "actions": model.takes[1],
        "aliases": [alias for alias, preset in aliases().items() if preset == name],
    }


def import_target(target: str) -> Any:
    """Return the class or function that a dotted path names."""
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import {target!r}: {error}; give the full path, such as my_pkg.MyModel, and "
            "run where my_pkg can be imported"
        ) from error
    if not callable(found):
        raise ValueError(f"{target} is {found!r}; expected a class or a function; name one")
    return found


def _plain(value: Any) -> Any:
    """Turn lists into tuples, and NumPy's integers, as in `env.action_space.n`, into Python's."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(v) for v in value)
    return value
