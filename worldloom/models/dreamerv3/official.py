"""Read the weights of the official DreamerV3 (danijar/dreamerv3): flat npz files and checkpoints.

Official arrays keep flat names such as `dyn/dynin0/kernel`; linear kernels are (in, out) and
convolution kernels (height, width, in, out). Nothing but arrays is ever unpickled.
"""

import io
import math
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.models.dreamerv3.model import DreamerV3
from worldloom.models.dreamerv3.networks import module_name

# Our names, then theirs; {0} and {1} are the groups of the pattern.
_NAMES = [
    (r"encoder\.mlp\.(\d+)\.linear\.(\w+)", "enc/mlp{0}/{1}"),
    (r"encoder\.mlp\.(\d+)\.norm\.(\w+)", "enc/mlp{0}norm/{1}"),
    (r"encoder\.cnn\.(\d+)\.conv\.(\w+)", "enc/cnn{0}/{1}"),
    (r"encoder\.cnn\.(\d+)\.norm\.(\w+)", "enc/cnn{0}norm/{1}"),
    (r"rssm\.deter_in\.linear\.(\w+)", "dyn/dynin0/{0}"),
    (r"rssm\.deter_in\.norm\.(\w+)", "dyn/dynin0norm/{0}"),
    (r"rssm\.stoch_in\.linear\.(\w+)", "dyn/dynin1/{0}"),
    (r"rssm\.stoch_in\.norm\.(\w+)", "dyn/dynin1norm/{0}"),
    (r"rssm\.action_in\.linear\.(\w+)", "dyn/dynin2/{0}"),
    (r"rssm\.action_in\.norm\.(\w+)", "dyn/dynin2norm/{0}"),
    (r"rssm\.hidden\.(\d+)\.linear\.(\w+)", "dyn/dynhid{0}/{1}"),
    (r"rssm\.hidden\.(\d+)\.norm\.(\w+)", "dyn/dynhid{0}norm/{1}"),
    (r"rssm\.gru\.(\w+)", "dyn/dyngru/{0}"),
    (r"rssm\.prior\.(\d+)\.linear\.(\w+)", "dyn/prior{0}/{1}"),
    (r"rssm\.prior\.(\d+)\.norm\.(\w+)", "dyn/prior{0}norm/{1}"),
    (r"rssm\.prior_logits\.(\w+)", "dyn/priorlogit/{0}"),
    (r"rssm\.posterior\.(\d+)\.linear\.(\w+)", "dyn/obs{0}/{1}"),
    (r"rssm\.posterior\.(\d+)\.norm\.(\w+)", "dyn/obs{0}norm/{1}"),
    (r"rssm\.posterior_logits\.(\w+)", "dyn/obslogit/{0}"),
    (r"decoder\.mlp\.(\d+)\.linear\.(\w+)", "dec/mlp/linear{0}/{1}"),
    (r"decoder\.mlp\.(\d+)\.norm\.(\w+)", "dec/mlp/norm{0}/{1}"),
    (r"decoder\.image\.sp1\.norm\.(\w+)", "dec/sp1norm/{0}"),
    (r"decoder\.image\.sp1\.linear\.(\w+)", "dec/sp1/{0}"),
    (r"decoder\.image\.(sp0|sp2|spnorm|imgout)\.(\w+)", "dec/{0}/{1}"),
    (r"(reward|cont|actor|critic|slow_critic)\.mlp\.(\d+)\.linear\.(\w+)", "{0}/mlp/linear{1}/{2}"),
    (r"(reward|cont|actor|critic|slow_critic)\.mlp\.(\d+)\.norm\.(\w+)", "{0}/mlp/norm{1}/{2}"),
    (r"(reward|critic|slow_critic)\.out\.(\w+)", "{0}/head/logits/{1}"),
    (r"cont\.out\.(\w+)", "con/head/logit/{0}"),
]
_HEADS = {"reward": "rew", "cont": "con", "actor": "pol", "critic": "val", "slow_critic": "slowval"}


def official_names(model: DreamerV3, keys: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map the name of each of our tensors to its official name.

    `keys` renames observation and action keys (ours to theirs). Tensors without an official
    counterpart are left out.
    """
    names = {}
    for name in model.state_dict():
        official = _official_name(model, name, dict(keys or {}))
        if official is not None:
            names[name] = official
    return names


def _official_name(model: DreamerV3, name: str, keys: dict[str, str]) -> str | None:
    if match := re.fullmatch(r"decoder\.vec\.(.+)\.(weight|bias)", name):
        key = _key_of(match[1], model.obs_spaces)
        out = "logits" if model.obs_spaces[key].classes else "pred"
        return f"dec/vec/{keys.get(key, key)}/{out}/{_part(match[2])}"
    if match := re.fullmatch(r"actor\.out\.(.+)\.layers\.(\w+)\.(weight|bias)", name):
        key = _key_of(match[1], model.act_spaces)
        return f"pol/head/{keys.get(key, key)}/{match[2]}/{_part(match[3])}"
    if match := re.fullmatch(r"decoder\.image\.stages\.(\d+)\.(conv|norm)\.(\w+)", name):
        assert model.decoder.image is not None
        index = len(model.decoder.image.stages) - 1 - int(match[1])
        return f"dec/conv{index}{'norm' * (match[2] == 'norm')}/{_part(match[3])}"
    if match := re.fullmatch(r"(retnorm|valnorm|advnorm)\.(first|second|corr)", name):
        return _normalizer_name(model, match[1], match[2])
    if name == "slow_count":
        return "slowval_count/value"
    for pattern, theirs in _NAMES:
        if match := re.fullmatch(pattern, name):
            groups = [_HEADS.get(g, _part(g)) for g in match.groups()]
            return theirs.format(*groups)
    return None


def _key_of(name: str, keys: Iterable[str]) -> str:
    return next(key for key in keys if module_name(key) == name)


def _part(name: str) -> str:
    return "kernel" if name == "weight" else name


def _normalizer_name(model: DreamerV3, name: str, part: str) -> str | None:
    norm = getattr(model, name)
    if norm.impl == "none" or (part == "corr" and not norm.debias):
        return None
    parts = {"perc": ("lo", "hi"), "meanstd": ("mean", "sqrs")}[norm.impl]
    return f"{name}/{dict(first=parts[0], second=parts[1], corr='corr')[part]}/value"


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


def arguments_of(
    arrays: Mapping[str, np.ndarray], obs_shape: Any, action_dim: Any, overrides: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return whether actions are discrete, and what the arrays say of a preset's options."""
    spaces, _ = match_spaces(arrays, obs_shape, action_dim)
    sizes = sizes_of(arrays, stoch=overrides.get("stoch"))
    return spaces["discrete"], {**sizes, **overrides, "obs_classes": spaces["obs_classes"]}


def renamed(model: DreamerV3, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return official arrays under the names of our model; unknown ones keep theirs."""
    _, keys = match_spaces(arrays, model.obs_shape, model.action_dim)
    ours = {theirs: name for name, theirs in official_names(model, keys).items()}
    return {ours.get(name, name): from_official(array) for name, array in arrays.items()}


def load_arrays(model: DreamerV3, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy official arrays into the model; a missing or misshapen one raises ValueError."""
    state = model.state_dict()
    _, keys = match_spaces(arrays, model.obs_shape, model.action_dim)
    for name, official in official_names(model, keys).items():
        if official.startswith("slowval/") and official not in arrays:
            official = official.replace("slowval/", "val/", 1)
        if official not in arrays:
            if official.endswith("/value"):
                continue
            raise ValueError(f"the official weights lack {official!r}, which this model needs")
        value = from_official(arrays[official])
        if value.shape != state[name].shape:
            theirs, ours = tuple(arrays[official].shape), tuple(to_official(state[name]).shape)
            raise ValueError(
                f"official array {official!r} has shape {theirs}, expected {ours}; obs_shape, "
                "action_dim or a size does not fit the file"
            )
        state[name].copy_(value)


def is_official(path: Path) -> bool:
    """Tell whether a path holds official weights, by the names of its files alone."""
    if path.is_dir():
        return any((path / name).exists() for name in ("agent.pkl", "latest", "ckpt"))
    return path.suffix in (".npz", ".pkl")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read official arrays by name from params.npz, agent.pkl, or a checkpoint folder.

    Raises:
        ValueError: the file holds anything but arrays, or is not an official parameter set.
    """
    if path.is_dir():
        path = path / "ckpt" if (path / "ckpt").is_dir() else path
        if (path / "latest").exists():
            path = path / (path / "latest").read_text().strip()
        path = path / "agent.pkl"
    if not path.is_file():
        raise ValueError(f"no file {path}; the official training writes agent.pkl into a folder")
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable npz file of plain arrays: {error}; nothing in it was "
                "run. Copy it again"
            ) from None
    else:
        arrays = _ArraysOnly(io.BytesIO(path.read_bytes())).read(path)
    if "dyn/dyngru/kernel" not in arrays:
        raise ValueError(
            f"{path} holds no 'dyn/dyngru/kernel'; it is not a parameter set of the official "
            "DreamerV3"
        )
    return arrays


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build numpy arrays and plain containers, and nothing else."""

    _ALLOWED = frozenset(
        (f"numpy{module}", name)
        for module, name in (
            (".core.multiarray", "_reconstruct"),
            ("._core.multiarray", "_reconstruct"),
            (".core.multiarray", "scalar"),
            ("._core.multiarray", "scalar"),
            ("._core.numeric", "_frombuffer"),
            (".core.numeric", "_frombuffer"),
            ("", "ndarray"),
            ("", "dtype"),
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every name that is not needed to rebuild an array."""
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}")
        return super().find_class(module, name)

    def read(self, path: Path) -> dict[str, np.ndarray]:
        """Return the arrays of an official agent.pkl."""
        try:
            params = self.load()["params"]
            arrays = {str(name): np.asarray(value) for name, value in params.items()}
        except Exception as error:
            raise ValueError(
                f"{path} is not an official checkpoint of plain arrays: {error}; nothing in it "
                "was run"
            ) from None
        if any(array.dtype == object for array in arrays.values()):
            raise ValueError(f"{path} holds Python objects where arrays were expected")
        return arrays


def sizes_of(arrays: Mapping[str, np.ndarray], stoch: int | None = None) -> dict[str, Any]:
    """Infer the hyperparameters that fix the shapes of all arrays, as overrides of a preset.

    The arrays hold only the product of `stoch` and classes; see `_split_latent` if it is None.
    """

    def count(pattern: str) -> int:
        return len({m[0] for name in arrays if (m := re.fullmatch(pattern, name))})

    def size(name: str, axis: int = -1) -> int:
        if name not in arrays:
            raise ValueError(f"the official weights lack {name!r}, which tells a size of the model")
        shape = arrays[name].shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"official array {name!r} has shape {shape}, too few axes")
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
        f"the official weights do not say how {width} latent units split into stoch x classes; "
        f"taking {stoch} x {width // stoch}: pass stoch= and classes= if that is wrong",
        stacklevel=4,
    )
    return stoch, width // stoch


def match_spaces(
    arrays: Mapping[str, np.ndarray],
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
    action_dim: int | Sequence[int] | Mapping[str, int],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the arrays say of the spaces (discrete, obs_classes) and how keys are renamed.

    A single observation or action takes whatever name the file has; several go by name, a
    sequence of actions by the sorted order of names.
    """
    vectors = {
        m[1]: m[2] for n in arrays if (m := re.fullmatch(r"dec/vec/(.+)/(pred|logits)/bias", n))
    }
    actions = {
        m[1]: m[2] for n in arrays if (m := re.fullmatch(r"pol/head/(.+)/(mean|logits)/bias", n))
    }
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
        if isinstance(action_dim, Sequence):
            digits = len(str(len(action_dim)))
            ours = [f"action{i:0{digits}}" for i in range(len(action_dim))]
        else:
            ours = ["action"]
        if len(ours) == len(actions):
            keys |= dict(zip(ours, sorted(actions), strict=True))
    return {"discrete": discrete, "obs_classes": obs_classes or None}, keys
