"""Read the weights of the official TD-MPC2 (nicklashansen/tdmpc2): .pt files of both layouts.

Official tensors keep names such as `_dynamics.0.ln.weight`; those of the Q-functions were numbered
before they were named. Nothing but tensors is ever unpickled.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.models.tdmpc2.model import TDMPC2
from worldloom.saving import damage

log = logging.getLogger(__name__)

# Our names, then theirs; {0} and {1} are the groups of the pattern.
_MODULES = "dynamics|reward|termination|actor|encoder.vector"
_NAMES = [
    (rf"({_MODULES})\.layers\.(\d+)\.linear\.(\w+)", "{0}.{1}.{2}"),
    (rf"({_MODULES})\.layers\.(\d+)\.norm\.(\w+)", "{0}.{1}.ln.{2}"),
    (rf"({_MODULES})\.layers\.(\d+)\.(\w+)", "{0}.{1}.{2}"),
    (r"(critic|target_critic)\.layers\.(\d+)\.(weight|bias)", "{0}.{1}.{2}"),
    (r"(critic|target_critic)\.layers\.(\d+)\.scale", "{0}.{1}.ln.weight"),
    (r"(critic|target_critic)\.layers\.(\d+)\.shift", "{0}.{1}.ln.bias"),
    (r"tasks\.embedding\.weight", "_task_emb.weight"),
    (r"tasks\.masks", "_action_masks"),
]
_PARTS = {
    "dynamics": "_dynamics",
    "reward": "_reward",
    "termination": "_termination",
    "actor": "_pi",
    "encoder.vector": "_encoder.state",
    "critic": "_Qs.params",
    "target_critic": "_target_Qs_params",
}
# What the tensors of a Q-function were before they had names, four to a layer.
_NUMBERED = ("weight", "bias", "ln.weight", "ln.bias")
# In the file but no weights: copies of the Q-functions and notes of the library that saved them.
_IGNORED = re.compile(r"_detach_Qs_params\..*|.*\.__(batch_size|device)")


def official_names(model: TDMPC2) -> dict[str, str]:
    """Map the name of each of our tensors to its official name; ours alone are left out."""
    found = {name: _official_name(name) for name in model.state_dict()}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _official_name(name: str) -> str | None:
    if match := re.fullmatch(r"encoder\.image\.convs\.(\d+)\.(\w+)", name):
        return f"_encoder.rgb.{2 + 2 * int(match[1])}.{match[2]}"
    for pattern, theirs in _NAMES:
        if match := re.fullmatch(pattern, name):
            return theirs.format(*[_PARTS.get(group, group) for group in match.groups()])
    return None


def is_official(path: Path) -> bool:
    """Tell whether a path may hold official weights, by its name alone."""
    return path.suffix in (".pt", ".pth")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Read official tensors by name, in the present layout.

    Raises:
        ValueError: the file is damaged, holds anything but tensors, or is no TD-MPC2.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: {damage(path, error)}; nothing in it was "
            "run. Expected a checkpoint of the official TD-MPC2; copy it again, or take another"
        ) from None
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = {
        _present_name(str(name)): value
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(value, Tensor) and not _IGNORED.fullmatch(str(name))
    }
    if lacking := [n for n in ("_dynamics.0.weight", "_Qs.params.0.weight") if n not in tensors]:
        raise ValueError(
            f"{path} holds no {lacking[0]!r}; it is not a checkpoint of the official TD-MPC2"
        )
    return tensors


def _present_name(name: str) -> str:
    """Name a numbered tensor of the Q-functions."""
    if match := re.fullmatch(r"(_Qs|_target_Qs)\.params\.(\d+)", name):
        part = "_Qs.params" if match[1] == "_Qs" else "_target_Qs_params"
        layer, kind = divmod(int(match[2]), 4)
        return f"{part}.{layer}.{_NUMBERED[kind]}"
    return name


def arguments_of(
    tensors: Mapping[str, Tensor], obs_shape: Any, action_dim: Any, overrides: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Return whether actions are discrete (never), and what the tensors say of a preset's options.

    What leaves no trace in them, such as simnorm_dim or the range of the bins, keeps its default.
    """
    found = {**sizes_of(tensors), **overrides}
    several = "_task_emb.weight" in tensors
    wanted = ["episode_lengths"] if several else ["episode_length"]
    wanted += ["action_dims"] if several and "_action_masks" not in tensors else []
    if unknown := [name for name in wanted if name not in overrides]:
        log.warning(
            "official TD-MPC2 weights do not say %s; taking the highest discount%s. Pass %s",
            " and ".join(unknown),
            " and all actions for every task" if "action_dims" in unknown else "",
            ", ".join(f"{name}=…" for name in unknown),
        )
    return False, found


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the hyperparameters that fix the shapes of all tensors."""

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"the file lacks {name!r}, which tells a size of the model")
        return tensors[name].shape

    def layers(part: str) -> int:
        return len({n for n in tensors if re.fullmatch(rf"{re.escape(part)}\.\d+\.weight", n)})

    last = layers("_Qs.params") - 1
    sizes: dict[str, Any] = {
        "mlp_dim": shape("_dynamics.0.weight")[0],
        "latent_dim": shape(f"_dynamics.{layers('_dynamics') - 1}.weight")[0],
        "num_q": shape("_Qs.params.0.weight")[0],
        "num_bins": shape(f"_Qs.params.{last}.weight")[1],
        "episodic": "_termination.0.weight" in tensors,
    }
    if "_encoder.state.0.weight" in tensors:
        sizes["enc_dim"] = shape("_encoder.state.0.weight")[0]
        # max(num_enc_layers - 1, 1) hidden layers and a last one: 1 and 2 look the same.
        sizes["num_enc_layers"] = layers("_encoder.state")
    if "_encoder.rgb.2.weight" in tensors:
        sizes["num_channels"] = shape("_encoder.rgb.2.weight")[0]
    if "log_std_min" in tensors:
        low, spread = float(tensors["log_std_min"]), float(tensors["log_std_dif"])
        sizes |= {"log_std_min": low, "log_std_max": low + spread}
    if "_task_emb.weight" in tensors:
        tasks, sizes["task_dim"] = shape("_task_emb.weight")
        width = shape(f"_pi.{layers('_pi') - 1}.weight")[0] // 2
        # Without masks, as in the older layout, every task has all actions unless told otherwise.
        masks = tensors.get("_action_masks", torch.ones(tasks, width))
        sizes["action_dims"] = masks.sum(1).long().tolist()
    return sizes


def renamed(model: TDMPC2, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return official tensors under the names of our model; unknown ones keep theirs."""
    ours = {theirs: name for name, theirs in official_names(model).items()}
    return {ours.get(name, name): value for name, value in tensors.items()}


def load_arrays(model: TDMPC2, tensors: Mapping[str, Tensor]) -> None:
    """Copy official tensors into the model.

    Raises:
        ValueError: a tensor is missing or has another shape; names it and both shapes.
    """
    state = model.state_dict()
    for name, theirs in official_names(model).items():
        if theirs not in tensors:
            if theirs == "_action_masks":
                continue
            raise ValueError(
                f"the official weights lack {theirs!r} {tuple(state[name].shape)}, which a model "
                f"for obs_shape={model.obs_shape}, action_dim={model.action_dim} needs"
            )
        value = tensors[theirs]
        if value.shape != state[name].shape:
            raise ValueError(
                f"official tensor {theirs!r} has shape {tuple(value.shape)}, expected "
                f"{tuple(state[name].shape)} for obs_shape={model.obs_shape}, "
                f"action_dim={model.action_dim}; give those of the environment it was trained in"
            )
        state[name].copy_(value)
