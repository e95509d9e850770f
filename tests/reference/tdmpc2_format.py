"""Read the recorded numbers of the official TD-MPC2, and feed the model its recorded draws.

The data's own README (shared/reference/README.md) defines the format. Nothing here knows a size or
an option: all of them are read from each agent's config.json. Time comes first: [H, B, ...].
"""

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import (
    ROOT,
    Recording,
    UnsupportedOption,
    array,
    load,
    prepare,
    tensor,
)
from worldloom.models.tdmpc2 import TDMPC2, draws
from worldloom.models.tdmpc2.losses import Transitions
from worldloom.models.tdmpc2.official import load_arrays, official_names
from worldloom.nn import distributions

FAMILY = "tdmpc2"

# Agents ------------------------------------------------------------------------------------------

# Official options that the model does not have: of training, of files, or derived from others.
_TRAINING = ("lr", "grad_clip_norm", "batch_size", "buffer_size", "steps", "seed", "compile")
_DERIVED = ("bin_size", "discount", "iterations_effective", "multitask", "obs", "obs_shapes")
_FILES = (
    *("enable_wandb", "wandb_silent", "save_agent", "save_csv", "save_video", "exp_name"),
    *("eval_episodes", "eval_freq", "task", "tasks"),
)


class Agent:
    """One folder of the reference: its configuration and weights."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.config = json.loads((ROOT / folder / "config.json").read_text())
        self.params = {k: array(v) for k, v in load(folder, "params.npz").items()}

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What TDMPC2 is built from; skips the test if it lacks an option."""
        try:
            return hyperparameters(self.config)
        except UnsupportedOption as reason:
            pytest.skip(f"{self.folder}: {reason}")

    def build(self, precision: str) -> TDMPC2:
        """Build the model and load its weights."""
        model = TDMPC2(**self.arguments)
        load_arrays(model, self.params)
        return prepare(model, precision).eval()

    def observation(self, obs: np.ndarray, dtype: torch.dtype) -> dict[str, Tensor]:
        """Name the recorded observation as the model does."""
        (key,) = self.config["obs_shape"]
        return {key: tensor(obs, dtype)}

    def transitions(self, arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> Transitions:
        """Turn one recorded batch into what the losses read; no row of it leaves its episode."""
        rewards = tensor(arrays["reward"], dtype).squeeze(-1)
        return Transitions(
            obs=self.observation(arrays["obs"], dtype),
            actions=tensor(arrays["action"], dtype),
            rewards=rewards,
            terminated=tensor(arrays["terminated"], dtype).squeeze(-1),
            alive=torch.ones_like(rewards),
            task=task_of(arrays),
        )


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Map the official options to the arguments of TDMPC2; most have the same name.

    Raises:
        UnsupportedOption: an option that neither TDMPC2 nor this module knows, or a value.
    """
    names = inspect.signature(TDMPC2).parameters
    known = {*names, *_TRAINING, *_DERIVED, *_FILES}
    if unknown := set(config) - known:
        raise UnsupportedOption(f"unknown options {sorted(unknown)}")
    if config["num_bins"] < 2:
        raise UnsupportedOption("rewards and values without bins are not supported")
    several = config["multitask"]
    arguments = {name: config[name] for name in names if name in config}
    return arguments | {
        "obs_shape": {key: tuple(shape) for key, shape in config["obs_shape"].items()},
        "discrete": False,
        "action_dims": config["action_dims"] if several else None,
        "episode_lengths": config["episode_lengths"] if several else None,
        "decoder": False,
    }


def task_of(arrays: Mapping[str, np.ndarray], name: str = "task") -> Tensor | None:
    """Return recorded task ids, or None where there is a single task."""
    return array(arrays[name]) if name in arrays else None


def official_params(model: TDMPC2) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by official name."""
    names = official_names(model)
    return {names[k]: p for k, p in model.named_parameters() if p.requires_grad}


def official_state(model: TDMPC2) -> dict[str, Tensor]:
    """Return copies of all tensors by official name."""
    state = model.state_dict()
    low, high = model.options.log_std_min, model.options.log_std_max
    limits = {"log_std_min": torch.tensor(low), "log_std_dif": torch.tensor(high - low)}
    return limits | {theirs: state[k].clone() for k, theirs in official_names(model).items()}


def gradients(model: TDMPC2) -> dict[str, Tensor]:
    """Return copies of the gradients by official name, of what has one."""
    params = official_params(model)
    return {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


# Draws -------------------------------------------------------------------------------------------


class Draws:
    """The recorded draws of one file, handed out in their order."""

    def __init__(self, recording: Recording) -> None:
        self.arrays = recording.group("draw")
        self.dtype = recording.dtype
        self.names = sorted(self.arrays, key=lambda name: int(name.split("_")[0]))
        self.position = 0

    def take(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Return the next draw, which must be of this kind and as many numbers."""
        wanted = f"{kind} {shape} as draw {self.position}"
        assert self.position < len(self.names), f"the model asks for {wanted}; none is left"
        name = self.names[self.position]
        value = self.arrays[name]
        matches = name.split("_")[1] == kind and value.size == math.prod(shape)
        assert matches, f"the model asks for {wanted}; recorded is {name} {value.shape}"
        self.position += 1
        return tensor(value, self.dtype)

    def standard_normal(self, like: Tensor, *shape: int) -> Tensor:
        shape = shape or tuple(like.shape)
        value = self.take("normal", shape)
        if len(shape) == 4:  # candidates [1, N, H, A] of a plan, recorded as (H, N, A)
            value = value.transpose(0, 1)
        rows = shape[1:] if value.ndim < len(shape) else shape  # plans are recorded one at a time
        assert value.shape == rows, f"the model asks for {shape}; recorded is {value.shape}"
        return value.reshape(shape)

    def draw_two_heads(self, count: int, device: torch.device) -> Tensor:
        order = self.take("permutation", (count,))
        assert order.sort().values.tolist() == list(range(count))
        return order[:2]

    def draw_shifts(self, images: int, most: int, device: torch.device) -> Tensor:
        shifts = self.take("shift", (images, 2)).reshape(images, 2).long()
        assert shifts.min() >= 0 and shifts.max() <= most
        return shifts

    def draw_exponential(self, like: Tensor) -> Tensor:
        return self.take("exponential", tuple(like.shape)).reshape(like.shape)


@contextmanager
def drawing(recording: Recording) -> Iterator[Draws]:
    """Replace the model's randomness by recorded draws, of which none may be left at the end."""
    feed = Draws(recording)
    places = [(distributions, "standard_normal")]
    places += [(draws, name) for name in ("draw_two_heads", "draw_shifts", "draw_exponential")]
    with ExitStack() as stack:
        for module, name in places:
            stack.enter_context(mock.patch.object(module, name, getattr(feed, name)))
        yield feed
    left = feed.names[feed.position :]
    assert not left, f"{len(left)} recorded draws are left over, from {left[0]} on"


@contextmanager
def watching(cls: type, *methods: str) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Note the arguments and the result of each call of some methods, by name."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in methods}

    def watched(name: str) -> Any:
        method = getattr(cls, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            calls[name].append((args, result))
            return result

        return call

    with ExitStack() as stack:
        for name in methods:
            stack.enter_context(mock.patch.object(cls, name, watched(name)))
        yield calls
