"""World models by name: presets, aliases, saved folders, checkpoints and official weights."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worldloom.devices import require_device
from worldloom.errors import escape, suggest
from worldloom.presets import (
    aliases,
    describe_preset,
    load_preset,
    override_preset,
    preset_names,
)
from worldloom.protocol import count_parameters
from worldloom.records import (
    REGISTERED,
    build_bounded,
    find_targets,
    import_target,
    list_parameters,
    name_target,
    record_call,
)
from worldloom.saving import Tensors, load_tensors, read_weights
from worldloom.trees import map_tree

ObsShape = tuple[int, ...] | Mapping[str, tuple[int, ...]]
ActionDim = int | Sequence[int] | Mapping[str, int]
Discrete = bool | Mapping[str, bool]
SPACES = ("obs_shape", "action_dim", "discrete")


def create_world_model(
    model: str | Path,
    obs_shape: ObsShape | None = None,
    action_dim: ActionDim | None = None,
    discrete: Discrete | None = None,
    device: str | torch.device = "cpu",
    *,
    allow: str | Sequence[str] = (),
    **overrides: Any,
) -> Any:
    """Create a world model, or load one.

    Nothing else in the process changes, in particular not its allocator. Before training on a CPU
    in your own script, call `worldloom.memory.keep_freed_memory()` as the commands do.

    Args:
        model: a preset ("dreamerv3:size12m"), an alias ("dreamer"), or a path: a folder written by
            save_pretrained, a run folder, a .ckpt file, or official weights of DreamerV3 (.npz,
            agent.pkl, a checkpoint folder) or TD-MPC2 (.pt).
        obs_shape: shape of one observation, (3, 64, 64) for an image, (4,) for a vector, or a
            dict of such shapes. Saved models record theirs.
        action_dim: number of continuous actions, or of classes of a discrete action; a sequence of
            numbers of classes for multi-discrete actions. Saved models record theirs.
        discrete: whether actions are discrete (one-hot); by default continuous in [-1, 1].
        device: device of the model.
        allow: import paths of models outside worldloom that saved configurations may name, or one.
        overrides: hyperparameters that replace those of the preset (see conf/model).
            `_target_="my_pkg.Mine"` builds a subclass, with its own hyperparameters.

    Returns:
        A `WorldModel` that is an nn.Module.

    Raises:
        ValueError: an unknown name or hyperparameter (the message suggests a similar one), a shape
            or action_dim that no model supports, no such device, or an unreadable path.
    """
    device = require_device(device)
    if _is_path(model):
        allowed = (allow,) if isinstance(allow, str) else allow
        built = _load(Path(model), (obs_shape, action_dim, discrete), allowed, overrides)
    else:
        preset = load_preset(str(model))
        own = find_own_parameters(preset, overrides)
        config = override_preset(preset, overrides, str(model), own)
        if obs_shape is None or action_dim is None:
            raise ValueError(
                f"create_world_model({str(model)!r}) needs obs_shape and action_dim, for example "
                "obs_shape=(3, 64, 64), action_dim=4"
            )
        built = build_model(config, obs_shape, action_dim, discrete or False)
    return built.to(device)


def list_models(verbose: bool = False) -> list[str] | dict[str, dict[str, Any]]:
    """Return the names of all presets; with `verbose` a dict that describes each of them.

    The descriptions have "description", "parameters" (for (3, 64, 64) images and 6 continuous
    actions), "observations", "actions" and "aliases".
    """
    names = preset_names()
    return {name: _describe(name) for name in names} if verbose else names


def _describe(name: str) -> dict[str, Any]:
    """Describe a preset; its parameters are counted without allocating them."""
    with torch.device("meta"):
        model: Any = build_model(load_preset(name), (3, 64, 64), 6)
    return {
        "description": describe_preset(name),
        "parameters": count_parameters(model),
        "observations": model.takes[0],
        "actions": model.takes[1],
        "aliases": [alias for alias, preset in aliases().items() if preset == name],
    }


def build_model(
    config: Mapping[str, Any],
    obs_shape: ObsShape,
    action_dim: ActionDim,
    discrete: Discrete = False,
) -> nn.Module:
    """Build the class config["_target_"] for the spaces of an environment.

    The class is called as `cls(obs_shape=…, action_dim=…, discrete=…, **rest of config)`. A list,
    as configurations have it, becomes a tuple where the default of the parameter is one.
    """
    target = str(config["_target_"])
    options = {k: v for k, v in config.items() if k not in ("_target_", "_partial_")}
    for name, parameter in list_parameters(import_target(target))[0].items():
        if isinstance(parameter.default, tuple) and isinstance(options.get(name), list):
            options[name] = tuple(options[name])
    spaces = zip(SPACES, (obs_shape, action_dim, discrete), strict=True)
    return construct(target, {**dict(spaces), **options}, SPACES)


def construct(
    target: str,
    arguments: Mapping[str, Any],
    needed: Sequence[str] = (),
    most: tuple[int, int] | None = None,
) -> nn.Module:
    """Call the class or function `target`, and record the call in the model.

    target: a name in REGISTERED, or an import path.
    needed: parameters that it must have.
    most: numbers and tensors in the file with the model's weights, if there is one. A class of
        worldloom that would have more is not built.

    Raises:
        ValueError: the class cannot be imported, does not accept the arguments, or is not a module,
            or a model of worldloom is larger than the file or the free memory.
    """
    cls = import_target(REGISTERED.get(target, target))
    parameters, takes_any = list_parameters(cls)
    if not takes_any:
        _require_accepted(getattr(cls, "__name__", target), arguments, parameters, needed)
    spaces = {
        name: map_tree(_to_python, arguments[name], sequence=tuple)
        for name in SPACES
        if name in arguments
    }
    arguments = {**arguments, **spaces}
    if name_target(cls) in REGISTERED:
        model = build_bounded(cls, arguments, most)
    else:
        model = cls(**arguments)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{target} returned a {type(model).__name__}, which is not a torch.nn.Module; "
            "expected a world model (worldloom/protocol.py); derive its class from torch.nn.Module"
        )
    made: Any = model
    made.build_config = record_call(cls, (), arguments, name_target(cls, target))
    return model


def _require_accepted(
    cls: str, arguments: Mapping[str, Any], parameters: Mapping[str, Any], needed: Sequence[str]
) -> None:
    """Raise ValueError unless a class accepts all arguments and has the parameters it needs."""
    if missing := [name for name in needed if name not in parameters]:
        raise ValueError(
            f"{cls} does not take {', '.join(missing)}; models are built as "
            f"{cls}(obs_shape=…, action_dim=…, discrete=…) and the arguments in the "
            "configuration; add these parameters"
        )
    for name in arguments:
        if name not in parameters:
            raise ValueError(
                f"{cls} has no hyperparameter {name!r}{suggest(name, parameters)}; it takes "
                f"{', '.join(parameters)}"
            )


def find_own_parameters(
    preset: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the default of each parameter that a class adds to those of a preset.

    given: the overrides of the preset; `_target_` among them names the class. The default of a
        parameter without one is None.

    Returns:
        None for a class of worldloom, all of whose parameters are in its presets.

    Raises:
        ValueError: the class cannot be imported.
    """
    cls = import_target(str(given.get("_target_", preset["_target_"])))
    if name_target(cls) in REGISTERED:
        return None
    parameters, takes_any = list_parameters(cls)
    own = dict.fromkeys(given) if takes_any else {}
    for name, parameter in parameters.items():
        default = None if parameter.default is parameter.empty else parameter.default
        own[name] = float(default) if type(default) is int else default  # 1 may stand for 1.0
    return {name: default for name, default in own.items() if name not in (*preset, *SPACES)}


def _to_python(value: Any) -> Any:
    """Return NumPy's numbers and arrays, as in `env.action_space.n`, as Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return tuple(value) if isinstance(value, list) else value


# Loading ------------------------------------------------------------------------------------------


def _is_path(model: str | Path) -> bool:
    """Return whether `model` is a path: names of presets have no separator and no suffix."""
    if isinstance(model, Path) or "/" in model or "\\" in model:
        return True
    if Path(model).suffix in (".ckpt", ".npz", ".pkl", ".pt", ".pth", ".safetensors"):
        return True
    # A preset takes precedence over a folder of the same name.
    return Path(model).exists() and model not in (*preset_names(), *aliases())


def _load(
    path: Path, spaces: tuple[Any, Any, Any], allow: Sequence[str], overrides: dict[str, Any]
) -> nn.Module:
    """Build the model that a path contains, and load its weights."""
    if not path.exists():
        raise ValueError(f"no file or folder {str(path)!r}; check the path, or name a preset")
    if official := _find_official(path):
        return _load_official(official, path, spaces, overrides)
    if overrides:
        raise ValueError(f"{path} is a saved model; {sorted(overrides)} cannot be changed in it")
    config, tensors = read_weights(path)
    arguments = config.get("arguments") if isinstance(config, dict) else None
    if "model" not in (config or ()) or not isinstance(arguments, dict):
        raise ValueError(
            f"{path} does not record how to build its model; expected 'model' and 'arguments' in it"
        )
    target = str(config["model"])
    foreign = [] if target in REGISTERED else [target]
    foreign += find_targets(arguments)
    if any(name not in allow for name in foreign):
        what = "the model " * (target not in REGISTERED) + " and ".join(map(repr, foreign))
        raise ValueError(
            f"{path} names {what}, which {'is' if len(foreign) == 1 else 'are'} not part of "
            f"worldloom; if you trust it, pass allow={tuple(foreign)}"
        )
    for name, given in zip(SPACES, spaces, strict=True):
        known = arguments.get(name, given)
        now, saved = (map_tree(_to_python, x, sequence=tuple) for x in (given, known))
        if given is not None and now != saved:
            raise ValueError(f"{path} was saved with {name}={known}, not {given}")
    most = sum(tensor.numel() for tensor in tensors.values()), len(tensors)
    try:
        model = construct(target, arguments, most=most)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    load_tensors(model, tensors, path)
    return model


def _find_official(path: Path) -> tuple[str, Any] | None:
    """Return the family and the module that reads official weights at a path, or None."""
    for family in REGISTERED:
        name = f"worldloom.models.{family}.official"
        if find_spec(name) is None:  # a family without official weights
            continue
        module = importlib.import_module(name)
        if module.is_official(path):
            return family, module
    return None


def _load_official(
    official: tuple[str, Any], path: Path, spaces: tuple[Any, Any, Any], overrides: dict[str, Any]
) -> nn.Module:
    """Build a model of the sizes of official weights, and load them."""
    family, module = official
    obs_shape, action_dim, discrete = spaces
    if obs_shape is None or action_dim is None:
        raise ValueError(
            f"official weights do not record their spaces; pass obs_shape and action_dim for {path}"
        )
    arrays = module.read_arrays(path)
    found, sizes = module.infer_arguments(arrays, obs_shape, action_dim, overrides)
    if discrete is not None and discrete != found:
        raise ValueError(
            f"discrete={discrete}, but the policy in {path} has "
            f"{'discrete' if found else 'continuous'} actions"
        )
    preset = next(name for name in preset_names() if name.startswith(family))
    config = override_preset(load_preset(preset), sizes, family)
    model = build_model(config, obs_shape, action_dim, found)
    module.load_arrays(model, arrays)
    return model


# Transfer -----------------------------------------------------------------------------------------


@dataclass
class Transfer:
    """Result of `transfer`.

    matched: names of the model's tensors that were copied.
    skipped: {name: reason} of tensors that keep their initial values.
    unused: names of tensors that are only in the file.
    """

    matched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Return the number of tensors copied for each part, and the tensors that were not."""
        total = len(self.matched) + len(self.skipped)
        lines = [f"{len(self.matched)} of {total} tensors copied:"]
        parts: dict[str, list[bool]] = {}
        for name in (*self.matched, *self.skipped):
            parts.setdefault(name.split(".")[0], []).append(name not in self.skipped)
        lines += [f"  {part:<16}{sum(each)} of {len(each)}" for part, each in parts.items()]
        lines += [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        if self.unused:
            lines.append(f"  only in the file: {', '.join(self.unused)}")
        return "\n".join(map(escape, lines))


@torch.no_grad()
def transfer(model: nn.Module, path: str | Path) -> Transfer:
    """Copy tensors of the same name and shape from saved or official weights into a model.

    path: of a saved model, a run, a .ckpt file or official weights.

    Raises:
        ValueError: the path does not exist, cannot be read, has no tensor that fits, or its model
            concatenates observations in another order.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise ValueError(f"init_from: no file or folder {str(path)!r}; check the path")
    tensors = _read_tensors(model, source)
    result = Transfer(unused=sorted(tensors.keys() - model.state_dict().keys()))
    for name, current in model.state_dict().items():
        if name not in tensors:
            result.skipped[name] = "not in the file"
        elif tensors[name].shape != current.shape:
            shapes = tuple(tensors[name].shape), tuple(current.shape)
            result.skipped[name] = f"{shapes[0]} in the file, {shapes[1]} in the model"
        else:
            current.copy_(tensors[name])
            result.matched.append(name)
    if not result.matched:
        name, reason = next(iter(result.skipped.items()))
        raise ValueError(
            f"init_from: nothing in {path} fits {type(model).__name__} (first {name!r}: {reason}); "
            "expected weights of the same family of models"
        )
    return result


def _read_tensors(model: nn.Module, source: Path) -> Tensors:
    """Read all tensors of a file by the model's names."""
    if (official := _find_official(source)) is None:
        config, tensors = read_weights(source)
        if require := getattr(model, "require_same_inputs", None):
            require(config, tensors, source)
        return tensors
    family, module = official
    if not isinstance(model, import_target(REGISTERED[family])):
        raise ValueError(
            f"init_from: {source} contains official weights of {family}, but the model is a "
            f"{type(model).__name__}; expected weights of the same family of models"
        )
    return module.rename_arrays(model, module.read_arrays(source))
