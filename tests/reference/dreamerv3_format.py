"""Read the recorded numbers of the official DreamerV3.

The data's own README (shared/reference/README.md) defines the format. Nothing here knows a size, a
key or an option: all of them are read from each agent's config.json.
"""

import copy
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import (
    ROOT,
    UnsupportedOption,
    below,
    load,
    prepare,
    tensor,
)
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.dreamerv3.official import load_arrays, official_names, to_official
from worldloom.nn import distributions


class Agent:
    """One folder of the reference: its configuration, weights and batch."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.config = json.loads((ROOT / folder / "config.json").read_text())
        self.params = load(folder, "params.npz")
        self.obs_space = {k: self.config["obs_space"][k] for k in self.config["obs_keys_in_order"]}
        self.act_space = {k: self.config["act_space"][k] for k in self.config["act_keys_in_order"]}

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What DreamerV3 is built from; skips the test if it lacks an option."""
        try:
            return spaces(self.obs_space, self.act_space) | hyperparameters(self.config["agent"])
        except UnsupportedOption as reason:
            pytest.skip(f"{self.folder}: {reason}")

    def build(self, precision: str, **overrides: Any) -> DreamerV3:
        """Build the model and load its weights."""
        model = DreamerV3(**{**self.arguments, **overrides})
        load_arrays(model, self.params)
        return prepare(model, precision)

    @property
    def latent(self) -> tuple[int, int]:
        """Stoch and classes."""
        return self.arguments["stoch"], self.arguments["classes"]

    def observation(
        self, arrays: Mapping[str, np.ndarray], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Turn recorded observations into ours: channels first."""
        obs = {}
        for key, space in self.obs_space.items():
            value = tensor(arrays[key], dtype)
            obs[key] = value.movedim(-1, -3) if is_image(space) else value
        return obs

    def action(self, arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> Tensor:
        """Turn recorded actions into action vectors: choices one-hot, keys sorted."""
        parts = []
        for key in sorted(self.act_space):
            shape = self.act_space[key]["shape"]
            value = tensor(arrays[key], dtype)
            if count := classes_of(self.act_space[key]):
                value = torch.nn.functional.one_hot(value.long(), count).to(dtype)
                shape = [*shape, count]
            parts.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
        return torch.cat(parts, -1)

    def split_action(self, action: Tensor) -> dict[str, Tensor]:
        """Turn action vectors back into what is recorded."""
        sizes = {k: (s["shape"], classes_of(s)) for k, s in sorted(self.act_space.items())}
        widths = [int(np.prod(shape)) * max(1, count) for shape, count in sizes.values()]
        parts = {}
        for (key, (shape, count)), part in zip(
            sizes.items(), action.split(widths, -1), strict=True
        ):
            if count:
                parts[key] = part.unflatten(-1, (*shape, count)).argmax(-1)
            else:
                parts[key] = part.reshape(*part.shape[:-1], *shape)
        return parts

    def flat(self, stoch: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
        """Flatten recorded stoch [..., S, C]."""
        return tensor(np.asarray(stoch), dtype).flatten(-2)

    def grouped(self, stoch: Tensor) -> Tensor:
        """Unflatten our stoch [..., S * C]."""
        return stoch.unflatten(-1, self.latent)

    def key_loss(self, term: str) -> str:
        """Return the recorded name of one of our loss terms."""
        return term.removeprefix("rec/")


def is_image(space: Mapping[str, Any]) -> bool:
    return space["dtype"] == "uint8" and len(space["shape"]) == 3


def classes_of(space: Mapping[str, Any]) -> int:
    """Return the number of classes of a discrete space, else 0."""
    if is_image(space) or space["dtype"].startswith("float"):
        return 0
    return 2 if space["dtype"] == "bool" else int(np.max(space["high"]) - np.min(space["low"]))


def spaces(
    obs_space: Mapping[str, Mapping[str, Any]], act_space: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Map recorded spaces to the arguments of DreamerV3."""
    shapes = {}
    for key, space in obs_space.items():
        *rest, last = space["shape"] or [None]
        shapes[key] = (last, *rest) if is_image(space) else tuple(space["shape"])
    actions, discrete = {}, {}
    for key, space in act_space.items():
        count = classes_of(space)
        if count and space["shape"]:
            raise UnsupportedOption(f"action {key!r} is a discrete array {space['shape']}")
        actions[key] = count or int(np.prod(space["shape"]))
        discrete[key] = bool(count)
    return {
        "obs_shape": shapes,
        "obs_classes": {k: n for k, s in obs_space.items() if (n := classes_of(s))} or None,
        "action_dim": actions,
        "discrete": discrete,
    }


# Official options with only one supported value, and options without effect on recorded numbers.
_ONLY = {
    "*/typ": ("simple", "rssm"),
    "*/act": ("silu",),
    "*/norm": ("rms",),
    "*/outer": (False,),
    "*/strided": (False,),
    "rewhead/output": ("symexp_twohot",),
    "conhead/output": ("binary",),
    "value/output": ("symexp_twohot",),
    "policy_dist_cont": ("bounded_normal",),
    "policy_dist_disc": ("categorical",),
}
_NO_EFFECT = {
    "*/winit": "initial values only",
    "dec/simple/outscale": "initial values only",
    "dyn/rssm/outscale": "initial values only",
    "policy/unimix": "ignored by the official categorical policy",
    "report*": "reports, not training",
    "opt/*": "opt_of_train_npz counts",
}
# Groups that both sides name alike inside: ours, then theirs.
_GROUPS = {
    "encoder": "enc/simple",
    "decoder": "dec/simple",
    "reward_head": "rewhead",
    "continue_head": "conhead",
    "actor": "policy",
    "critic": "value",
    "slow_critic": "slowvalue",
    "loss_scales": "loss_scales",
    "imag_loss": "imag_loss",
    "repl_loss": "repl_loss",
    "retnorm": "retnorm",
    "valnorm": "valnorm",
    "advnorm": "advnorm",
}
_RSSM = {
    **{k: k for k in ("deter", "hidden", "stoch", "classes", "blocks", "absolute", "unimix")},
    "dyn_layers": "dynlayers",
    "img_layers": "imglayers",
    "obs_layers": "obslayers",
    "free_nats": "free_nats",
}
_PLAIN = (
    "imag_length",
    "imag_last",
    "horizon",
    "contdisc",
    "reward_grad",
    "repval_loss",
    "repval_grad",
    "ac_grads",
)


def hyperparameters(agent: Mapping[str, Any]) -> dict[str, Any]:
    """Map the official option tree to the arguments of DreamerV3.

    Raises:
        UnsupportedOption: worldloom lacks an option, or this value of it.
    """
    options = dict(_leaves(agent))
    for pattern, allowed in _ONLY.items():
        for name in fnmatch.filter(list(options), pattern):
            if (value := options.pop(name)) not in allowed:
                raise UnsupportedOption(f"option {name} is {value!r}; only {allowed} is supported")
    for pattern in _NO_EFFECT:
        for name in fnmatch.filter(list(options), pattern):
            del options[name]
    arguments: dict[str, Any] = {
        "units": 1,  # every group below sets its own
        "depth": 1,
        "actor_critic": True,
        "replay_context": True,
    }
    for ours, theirs in _RSSM.items():
        arguments[ours] = options.pop(f"dyn/rssm/{theirs}")
    for name in _PLAIN:
        arguments[name] = options.pop(name)
    for ours, theirs in _GROUPS.items():
        arguments[ours] = below(options, theirs)
        for name in arguments[ours]:
            del options[f"{theirs}/{name}"]
    if options:
        raise UnsupportedOption(f"unknown options {sorted(options)}")
    return arguments


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


# Sampling ----------------------------------------------------------------------------------------


@contextmanager
def sampling(tables: Mapping[str, np.ndarray] | None = None) -> Iterator[None]:
    """Replace the models' randomness: the mode, or fixed noise from tables by shape."""

    def table(kind: str, like: Tensor) -> Tensor:
        assert tables is not None
        name = f"{kind}_{'x'.join(map(str, like.shape))}"
        if name in tables:
            return tensor(tables[name], like.dtype)
        # Ours flattens actions of several axes.
        for other, noise in tables.items():
            if other.startswith(kind) and (len(noise), noise[0].size) == tuple(like.shape):
                return tensor(noise, like.dtype).reshape(like.shape)
        raise AssertionError(f"no recorded noise {name}; there are {sorted(tables)}")

    def classes(probs: Tensor) -> Tensor:
        if tables is None:
            return probs.argmax(-1)
        return (probs.log() + table("gumbel", probs)).argmax(-1)

    def normal(mean: Tensor, stddev: Tensor) -> Tensor:
        return mean if tables is None else mean + stddev * table("normal", mean)

    old = distributions.sample_classes, distributions.sample_normal
    with replaced(old[0], classes), replaced(old[1], normal):
        yield


@contextmanager
def replaced(old: Callable, new: Callable) -> Iterator[None]:
    """Replace a function wherever worldloom has imported it."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("worldloom") and m]
    places = [(m, n) for m in modules for n, value in vars(m).items() if value is old]
    assert places
    patches = [mock.patch.object(module, name, new) for module, name in places]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def metrics(agent: Agent, out: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename losses and statistics of `compute_loss` as the official agent reports them."""
    names = {
        "dyn_loss": "dyn",
        "rep_loss": "rep",
        "reward_loss": "rew",
        "continue_loss": "con",
        "policy_loss": "policy",
        "value_loss": "value",
        "replay_value_loss": "repval",
        **{f"reconstruction_loss/{key}": key for key in agent.obs_space},
    }
    return {f"loss/{theirs}": out[ours] for ours, theirs in names.items() if ours in out} | out


# Weights -----------------------------------------------------------------------------------------


def official_params(model: DreamerV3) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by official name."""
    names = official_names(model)
    return {names[k]: p for k, p in model.named_parameters() if p.requires_grad}


def official_state(model: DreamerV3) -> dict[str, Tensor]:
    """Return all tensors by official name, in the official layout."""
    state = model.state_dict()
    return {theirs: to_official(state[ours]) for ours, theirs in official_names(model).items()}


def gradients(model: DreamerV3) -> dict[str, Tensor]:
    """Return the gradients by official name, in the official layout; zeros where there is none."""
    return {
        name: to_official(torch.zeros_like(p) if p.grad is None else p.grad)
        for name, p in official_params(model).items()
    }


def clone(model: DreamerV3) -> DreamerV3:
    """Copy a model, so that a second pass starts from the same running statistics."""
    return copy.deepcopy(model)
