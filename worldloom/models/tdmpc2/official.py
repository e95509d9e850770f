"""Weights of the official TD-MPC2 (nicklashansen/tdmpc2): .pt files of both layouts.

Official tensors have names such as `_dynamics.0.ln.weight`; in the older layout those of the
Q-functions have numbers. Only tensors are ever unpickled.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.files import read_tensors
from worldloom.models.tdmpc2.model import TDMPC2
from worldloom.models.tdmpc2.vector_order import choose_official_order, require_official_order
from worldloom.saving import describe_damage

log = logging.getLogger(__name__)

# Prefixes of worldloom's names and of the official ones.
_PREFIXES = {
    "encoder.vector.layers.": "_encoder.state.",
    "dynamics.layers.": "_dynamics.",
    "reward.layers.": "_reward.",
    "termination.layers.": "_termination.",
    "actor.layers.": "_pi.",
    "critic.layers.": "_Qs.params.",
    "target_critic.layers.": "_target_Qs_params.",
    "tasks.embedding.": "_task_emb.",
    "tasks.masks": "_action_masks",
}
# Parts of a name within a layer: linear maps have no name of their own, norms are called ln.
_LAYER = {"linear.": "", "norm.": "ln.", "scale": "ln.weight", "shift": "ln.bias"}
# Order of a Q-function's tensors in the older layout, four per layer.
_NUMBERED = ("weight", "bias", "ln.weight", "ln.bias")
# Entries without weights of their own: copies of the Q-functions, and metadata of tensordict.
_IGNORED = re.compile(r"_detach_Qs_params\..*|.*\.__(batch_size|device)")


def official_names(model: TDMPC2) -> dict[str, str]:
    """Return {worldloom's name: official name} of all tensors that the official model has."""
    found = {name: _official_name(name) for name in model.state_dict()}
    return {ours: theirs for ours, theirs in found.items() if theirs is not None}


def _official_name(name: str) -> str | None:
    """Return the official name of a tensor, or None if the official model has no such tensor."""
    if match := re.fullmatch(r"encoder\.image\.convs\.(\d+)\.(\w+)", name):
        return f"_encoder.rgb.{2 + 2 * int(match[1])}.{match[2]}"  # after shift, scaling, ReLUs
    for prefix, theirs in _PREFIXES.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            for ours, official in _LAYER.items():
                rest = rest.replace(ours, official)
            return theirs + rest
    return None


def is_official(path: Path) -> bool:
    """Return whether a path may contain official weights, judging by its name."""
    return path.suffix in (".pt", ".pth")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """Read official tensors by their names in the current layout.

    Raises:
        ValueError: the file is damaged, contains other objects than tensors, or is not a TD-MPC2.
    """
    try:
        content = read_tensors(path)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: {describe_damage(path, error)}; nothing in "
            "it was executed. Expected a checkpoint of the official TD-MPC2; copy it again, or use "
            "another one"
        ) from None
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    tensors = {
        _to_current_name(str(name)): value
        for name, value in (state.items() if isinstance(state, Mapping) else ())
        if isinstance(value, Tensor) and not _IGNORED.fullmatch(str(name))
    }
    if missing := [n for n in ("_dynamics.0.weight", "_Qs.params.0.weight") if n not in tensors]:
        raise ValueError(
            f"{path} contains no {missing[0]!r}; it is not a checkpoint of the official TD-MPC2"
        )
    return tensors


def _to_current_name(name: str) -> str:
    """Return the current name of a tensor, which has a number in the older layout."""
    if match := re.fullmatch(r"(_Qs|_target_Qs)\.params\.(\d+)", name):
        part = "_Qs.params" if match[1] == "_Qs" else "_target_Qs_params"
        layer, kind = divmod(int(match[2]), 4)
        return f"{part}.{layer}.{_NUMBERED[kind]}"
    return name


def infer_arguments(
    tensors: Mapping[str, Tensor], obs_shape: Any, action_dim: Any, overrides: Mapping[str, Any]
) -> tuple[bool, dict[str, Any]]:
    """Return whether actions are discrete (never), and the hyperparameters that tensors determine.

    Hyperparameters without effect on shapes, such as simnorm_dim or vmin, keep their defaults.

    Raises:
        ValueError: a tensor is missing, or the order of several vectors is not known.
    """
    found = {"task_dim": 0, **infer_sizes(tensors), **overrides}
    several = "_task_emb.weight" in tensors
    found["obs_order"] = choose_official_order(obs_shape, several, overrides.get("obs_order"))
    wanted = ["episode_lengths"] if several else ["episode_length"]
    wanted += ["action_dims"] if several and "_action_masks" not in tensors else []
    if unknown := [name for name in wanted if name not in overrides]:
        log.warning(
            "official TD-MPC2 weights do not record %s; using the highest discount%s. Pass %s",
            " and ".join(unknown),
            " and all actions for every task" if "action_dims" in unknown else "",
            ", ".join(f"{name}=…" for name in unknown),
        )
    return False, found


def infer_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the hyperparameters that determine the shapes of all tensors."""

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"the file lacks {name!r}, which determines a size of the model")
        return tensors[name].shape

    def count_layers(part: str) -> int:
        return len({n for n in tensors if re.fullmatch(rf"{re.escape(part)}\.\d+\.weight", n)})

    last = count_layers("_Qs.params") - 1
    sizes: dict[str, Any] = {
        "mlp_dim": shape("_dynamics.0.weight")[0],
        "latent_dim": shape(f"_dynamics.{count_layers('_dynamics') - 1}.weight")[0],
        "num_q": shape("_Qs.params.0.weight")[0],
        "num_bins": shape(f"_Qs.params.{last}.weight")[1],
        "episodic": "_termination.0.weight" in tensors,
    }
    if "_encoder.state.0.weight" in tensors:
        sizes["enc_dim"] = shape("_encoder.state.0.weight")[0]
        # num_enc_layers of 1 and 2 give the same network.
        sizes["num_enc_layers"] = count_layers("_encoder.state")
    if "_encoder.rgb.2.weight" in tensors:
        sizes["num_channels"] = shape("_encoder.rgb.2.weight")[0]
    if "log_std_min" in tensors:
        low, spread = float(tensors["log_std_min"]), float(tensors["log_std_dif"])
        sizes |= {"log_std_min": low, "log_std_max": low + spread}
    if "_task_emb.weight" in tensors:
        tasks, sizes["task_dim"] = shape("_task_emb.weight")
        width = shape(f"_pi.{count_layers('_pi') - 1}.weight")[0] // 2
        # The older layout has no masks; there every task has all actions, unless overridden.
        masks = tensors.get("_action_masks", torch.ones(tasks, width))
        sizes["action_dims"] = masks.sum(1).long().tolist()
    return sizes


def rename_arrays(model: TDMPC2, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return official tensors by the model's names; unknown ones keep theirs.

    Raises:
        ValueError: the model concatenates its vectors in an order that is wrong or may be wrong.
    """
    require_official_order(model, tensors.get("_encoder.state.0.weight"))
    ours = {theirs: name for name, theirs in official_names(model).items()}
    return {ours.get(name, name): value for name, value in tensors.items()}


def load_arrays(model: TDMPC2, tensors: Mapping[str, Tensor]) -> None:
    """Copy official tensors into the model.

    Raises:
        ValueError: a tensor is missing or has another shape; the message names both shapes.
    """
    state = model.state_dict()
    for name, theirs in official_names(model).items():
        if theirs not in tensors:
            if theirs == "_action_masks":  # absent in the older layout
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
                f"action_dim={model.action_dim}; pass those of its training environment"
            )
        state[name].copy_(value)
