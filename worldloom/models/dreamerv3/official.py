"""Weights of the official DreamerV3 (danijar/dreamerv3), from flat npz files and checkpoints.

Official arrays have flat names such as `dyn/dynin0/kernel`. Linear kernels are (in, out),
convolution kernels (height, width, in, out). Nothing but arrays is unpickled.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.files import read_arrays as read_npz
from worldloom.files import read_text
from worldloom.models.dreamerv3.model import DreamerV3
from worldloom.models.dreamerv3.networks import module_name
from worldloom.models.dreamerv3.pickles import ArrayUnpickler
from worldloom.models.spaces import ActSpaces

# Layers PREFIX[N].{linear,conv,norm}.PART, which the official code names THEIRS[N][norm]/PART.
_LAYERS = {
    "encoder.mlp.": "enc/mlp",
    "encoder.cnn.": "enc/cnn",
    "rssm.deter_in": "dyn/dynin0",
    "rssm.stoch_in": "dyn/dynin1",
    "rssm.action_in": "dyn/dynin2",
    "rssm.hidden.": "dyn/dynhid",
    "rssm.gru": "dyn/dyngru",
    "rssm.prior.": "dyn/prior",
    "rssm.prior_logits": "dyn/priorlogit",
    "rssm.posterior.": "dyn/obs",
    "rssm.posterior_logits": "dyn/obslogit",
    "decoder.image.": "dec/",
}
# Modules MODULE.mlp.N.{linear,norm}.PART, which it names THEIRS/mlp/{linear,norm}N/PART.
_MODULES = {
    "decoder": "dec",
    "reward": "rew",
    "cont": "con",
    "actor": "pol",
    "critic": "val",
    "slow_critic": "slowval",
}
_NORMALIZER_PARTS = {"perc": ("lo", "hi"), "meanstd": ("mean", "sqrs")}


def official_names(model: DreamerV3, keys: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map the names of the model's tensors to official names.

    `keys` maps observation and action keys to official ones. Tensors without an official
    counterpart are omitted.
    """
    names = {name: _official_name(model, name, keys or {}) for name in model.state_dict()}
    return {ours: theirs for ours, theirs in names.items() if theirs is not None}


def _official_name(model: DreamerV3, name: str, keys: Mapping[str, str]) -> str | None:
    if name == "slow_count":
        return "slowval_count/value"
    if match := re.fullmatch(r"(retnorm|valnorm|advnorm)\.(first|second|corr)", name):
        return _normalizer_name(model, match[1], match[2])
    stem, _, part = name.rpartition(".")
    part = "kernel" if part == "weight" else part
    if match := re.fullmatch(r"decoder\.vec\.(.+)", stem):
        key = _find_key(match[1], model.obs_spaces)
        out = "logits" if model.obs_spaces[key].classes else "pred"
        return f"dec/vec/{keys.get(key, key)}/{out}/{part}"
    if match := re.fullmatch(r"actor\.out\.(.+)\.layers\.(\w+)", stem):
        key = _find_key(match[1], model.act_spaces)
        return f"pol/head/{keys.get(key, key)}/{match[2]}/{part}"
    if match := re.fullmatch(rf"({'|'.join(_MODULES)})\.mlp\.(\d+)\.(linear|norm)", stem):
        return f"{_MODULES[match[1]]}/mlp/{match[3]}{match[2]}/{part}"
    if match := re.fullmatch(r"(reward|cont|critic|slow_critic)\.out", stem):
        return f"{_MODULES[match[1]]}/head/{'logit' if match[1] == 'cont' else 'logits'}/{part}"
    if match := re.fullmatch(r"decoder\.image\.stages\.(\d+)\.(conv|norm)", stem):
        assert model.decoder is not None and model.decoder.image is not None
        index = len(model.decoder.image.stages) - 1 - int(match[1])  # they count from the output
        stem = f"decoder.image.conv{index}.{match[2]}"
    for ours, theirs in _LAYERS.items():
        if match := re.fullmatch(re.escape(ours) + r"(\w*)(?:\.(linear|conv|norm))?", stem):
            return f"{theirs}{match[1]}{'norm' if match[2] == 'norm' else ''}/{part}"
    return None


def _find_key(name: str, keys: Iterable[str]) -> str:
    return next(key for key in keys if module_name(key) == name)


def _normalizer_name(model: DreamerV3, name: str, part: str) -> str | None:
    norm = getattr(model, name)
    if norm.impl == "none" or (part == "corr" and not norm.debias):
        return None
    first, second = _NORMALIZER_PARTS[norm.impl]
    return f"{name}/{dict(first=first, second=second, corr='corr')[part]}/value"


def to_official(tensor: Tensor) -> Tensor:
    """Return a weight in the official layout: (in, out) and (height, width, in, out)."""
    if tensor.ndim == 4:
        return tensor.permute(2, 3, 1, 0)
    return tensor.t() if tensor.ndim == 2 else tensor


def from_official(array: np.ndarray) -> Tensor:
    """Return an official array as a tensor in torch's layout."""
    tensor = torch.from_numpy(np.array(array))
    if tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()
    return tensor.t().contiguous() if tensor.ndim == 2 else tensor


def infer_arguments(
    arrays: Mapping[str, np.ndarray], obs_shape: Any, action_dim: Any, overrides: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return whether actions are discrete, and the hyperparameters that fit the arrays."""
    discrete, obs_classes, _ = match_spaces(arrays, obs_shape, action_dim)
    sizes = infer_sizes(arrays, stoch=overrides.get("stoch"))
    return discrete, {**sizes, **overrides, "obs_classes": obs_classes}


def rename_arrays(model: DreamerV3, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return official arrays under the names of the model's tensors; unknown ones keep theirs."""
    *_, keys = match_spaces(arrays, model.obs_shape, model.action_dim)
    ours = {theirs: name for name, theirs in official_names(model, keys).items()}
    return {ours.get(name, name): from_official(array) for name, array in arrays.items()}


def load_arrays(model: DreamerV3, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy official arrays into the model; raise ValueError if one is missing or misshapen."""
    state = model.state_dict()
    *_, keys = match_spaces(arrays, model.obs_shape, model.action_dim)
    for name, official in official_names(model, keys).items():
        if official.startswith("slowval/") and official not in arrays:
            official = official.replace("slowval/", "val/", 1)
        if official not in arrays:
            if official.endswith("/value"):
                continue
            raise ValueError(f"the official weights lack {official!r}, which the model requires")
        value = from_official(arrays[official])
        if value.shape != state[name].shape:
            theirs, ours = tuple(arrays[official].shape), tuple(to_official(state[name]).shape)
            raise ValueError(
                f"official array {official!r} has shape {theirs}, expected {ours}; obs_shape, "
                "action_dim or a size does not match the file"
            )
        state[name].copy_(value)


def is_official(path: Path) -> bool:
    """Return whether a path has the file names of official weights."""
    if path.is_dir():
        return any((path / name).exists() for name in ("agent.pkl", "latest", "ckpt"))
    return path.suffix in (".npz", ".pkl")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read official arrays by name from params.npz, agent.pkl, or a checkpoint folder.

    Raises:
        ValueError: the file contains anything but arrays, or is not an official parameter set.
    """
    if path.is_dir():
        path = path / "ckpt" if (path / "ckpt").is_dir() else path
        if (path / "latest").exists():
            path = path / read_text(path / "latest").strip()
        path = path / "agent.pkl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; official checkpoint folders contain agent.pkl")
    try:
        arrays = read_npz(path)[0] if path.suffix == ".npz" else ArrayUnpickler(path).read_arrays()
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as plain arrays: {error}; nothing in it was executed. Expected "
            "weights of the official DreamerV3; copy them again"
        ) from None
    if "dyn/dyngru/kernel" not in arrays:
        raise ValueError(
            f"{path} does not contain 'dyn/dyngru/kernel'; it is not a parameter set of the "
            "official DreamerV3"
        )
    return arrays


def infer_sizes(arrays: Mapping[str, np.ndarray], stoch: int | None = None) -> dict[str, Any]:
    """Infer the hyperparameters that determine the shapes of all arrays.

    The arrays only determine the product of `stoch` and classes; `_split_latent` guesses both if
    `stoch` is None.
    """

    def count(pattern: str) -> int:
        return len({m[0] for name in arrays if (m := re.fullmatch(pattern, name))})

    def size(name: str, axis: int = -1) -> int:
        if name not in arrays:
            raise ValueError(f"the official weights lack {name!r}, which determines a size")
        shape = arrays[name].shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"official array {name!r} has shape {shape}; expected more axes")
        return shape[axis]

    def head(name: str, bins: bool) -> dict[str, Any]:
        layers = count(rf"{name}/mlp/linear\d+/kernel")
        sizes = {"layers": layers, "units": size(f"{name}/mlp/linear0/kernel")}
        return sizes | ({"bins": size(f"{name}/head/logits/kernel")} if bins else {})

    gru, width = "dyn/dyngru/kernel", size("dyn/obslogit/kernel")
    stoch, classes = (stoch, width // stoch) if stoch else _split_latent(width)
    sizes: dict[str, Any] = {
        "deter": size(gru, 0) * size(gru, 1),
        "hidden": size("dyn/obs0/kernel"),
        "stoch": stoch,
        "classes": classes,
        "blocks": size(gru, 0),
        "dyn_layers": count(r"dyn/dynhid\d+/kernel"),
        "img_layers": count(r"dyn/prior\d+/kernel"),
        "obs_layers": count(r"dyn/obs\d+/kernel"),
        "reward_head": head("rew", bins=True),
        "continue_head": head("con", bins=False),
        "actor": head("pol", bins=False),
        "critic": head("val", bins=True),
        "encoder": {},
        "decoder": {},
    }
    for name, part, layer in (("encoder", "enc", "mlp"), ("decoder", "dec", "mlp/linear")):
        if "enc/mlp0/kernel" in arrays:
            layers = count(rf"{part}/{layer}\d+/kernel")
            sizes[name] |= {"layers": layers, "units": size(f"{part}/{layer}0/kernel")}
    if "enc/cnn0/kernel" in arrays:
        stages = count(r"enc/cnn\d+/kernel")
        depths = [size(f"enc/cnn{i}/kernel") for i in range(stages)]
        sizes["encoder"] |= {"kernel": size("enc/cnn0/kernel", 0), **_depths(depths)}
        depths = [size(f"dec/conv{i}/kernel") for i in range(stages - 1)]
        sizes["decoder"] |= {
            "kernel": size("dec/imgout/kernel", 0),
            "bspace": size("dec/sp0/kernel", 0),
            "units": size("dec/sp1/kernel") // 2,
            **_depths([*depths, size("dec/spnorm/scale")]),
        }
    return sizes


def _depths(depths: list[int]) -> dict[str, Any]:
    depth = math.gcd(*depths)
    return {"depth": depth, "mults": [d // depth for d in depths]}


def _split_latent(width: int) -> tuple[int, int]:
    """Guess stoch and classes from their product: every official preset has stoch 32."""
    if width % 32 == 0 and width >= 64:
        return 32, width // 32
    root = math.isqrt(width)
    stoch = root if root * root == width else width
    warnings.warn(
        f"the official weights have {width} latent units, which may be divided into stoch x "
        f"classes in several ways; using {stoch} x {width // stoch}: pass stoch= and classes= if "
        "that is wrong",
        stacklevel=4,
    )
    return stoch, width // stoch


def match_spaces(
    arrays: Mapping[str, np.ndarray],
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    action_dim: int | Sequence[int] | Mapping[str, int],
) -> tuple[Any, dict[str, int] | None, dict[str, str]]:
    """Return `discrete` and `obs_classes` of the arrays, and official names of our keys.

    A single observation or action matches any official key. Several match by name, and a sequence
    of actions by the sorted order of the official keys.
    """

    def outputs(pattern: str) -> dict[str, str]:
        return {m[1]: m[2] for name in arrays if (m := re.fullmatch(pattern, name))}

    vectors = outputs(r"dec/vec/(.+)/(pred|logits)/bias")
    actions = outputs(r"pol/head/(.+)/(mean|logits)/bias")
    keys: dict[str, str] = {}
    shapes = obs_shape if isinstance(obs_shape, Mapping) else {"obs": obs_shape}
    if not isinstance(obs_shape, Mapping) and len(vectors) == 1 and len(obs_shape) < 3:
        keys["obs"] = next(iter(vectors))
    obs_classes = {}
    for key, shape in shapes.items():
        theirs = keys.get(key, key)
        if vectors.get(theirs) == "logits":
            size = len(arrays[f"dec/vec/{theirs}/logits/bias"])
            obs_classes[key] = size // math.prod(shape)
    if isinstance(action_dim, Mapping):
        discrete: Any = {key: actions.get(key) == "logits" for key in action_dim}
    else:
        discrete = "logits" in actions.values()
        ours = list(ActSpaces(action_dim, discrete))
        if len(ours) == len(actions):
            keys |= dict(zip(ours, sorted(actions), strict=True))
    return discrete, obs_classes or None, keys
