"""What a model imagines from the steps of a recorded episode, with the episode's own actions.

Letters used in shapes: S starts, H = number of imagined steps, B starts at once, A = width of an
action. Column 0 of an array [S, H + 1] is the start itself, as the model sees it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.acting import use_seed
from worldloom.protocol import LatentState
from worldloom.view.episodes import Recording, to_rgb

STARTS_AT_ONCE = 32


@dataclass
class Imagined:
    """Imagination from the rows 0, every, 2 * every, ... of an episode.

    Values beyond the end of the episode, and those that the model does not predict, are NaN.

    rewards, continues: [S, H + 1]; column h is predicted for arriving at row start + h.
    values: [S, H + 1] of the imagined states; None for a model without values.
    state_errors: [S, H + 1], distance of the imagined features from those of the state that the
        model has after the observation, relative to the length of the latter.
    obs: {key: [S, H + 1, *shape]} predicted observations; images are [height, width, 3] uint8.
    errors: {key: [S, H + 1]} root mean square errors of the predictions.
    """

    every: int
    rewards: np.ndarray
    continues: np.ndarray
    values: np.ndarray | None
    state_errors: np.ndarray
    obs: dict[str, np.ndarray] = field(default_factory=dict)
    errors: dict[str, np.ndarray] = field(default_factory=dict)

    def thin(self, factor: int) -> "Imagined":
        """Return the imagination from every `factor`-th of these starts."""
        return Imagined(
            self.every * factor,
            self.rewards[::factor],
            self.continues[::factor],
            None if self.values is None else self.values[::factor],
            self.state_errors[::factor],
            {key: value[::factor] for key, value in self.obs.items()},
            {key: value[::factor] for key, value in self.errors.items()},
        )


class Dreamer:
    """Imagines with a model, and reads what it predicts.

    What a model lacks is left out: `value`, `discount`, `latent_probs`, and a `decode` that raises
    or returns no "obs".

    notes: lines about calls that failed.
    """

    def __init__(self, model: Any, seed: int = 0) -> None:
        self.model, self.seed = model, seed
        self.notes: list[str] = []
        self._failed: set[str] = set()

    @torch.no_grad()
    def evaluate(self, states: LatentState) -> np.ndarray | None:
        """Return the values [B] of states, or None for a model without values."""
        device = states.features.device
        with use_seed(self.seed, device):
            value = self._call("value", states)
        return None if value is None else _to_numpy(value).reshape(len(states))

    @torch.no_grad()
    def discount(self, states: LatentState) -> np.ndarray | None:
        """Return the discounts [B] of the values of states, or None if the model has none."""
        discount = self._call("discount", states)
        if isinstance(discount, Tensor):
            discount = _to_numpy(discount).reshape(-1)
        return None if discount is None else np.broadcast_to(discount, len(states))

    @torch.no_grad()
    def measure_surprise(self, recording: Recording) -> np.ndarray | None:
        """Return how far each observation moved the latents from their prediction, [N + 1].

        That is the Kullback-Leibler divergence of the inferred from the predicted latents in nats,
        summed over the variables; NaN in row 0. None for a model without `latent_probs`.
        """
        device, found = recording.states.features.device, [np.full(1, np.nan, np.float32)]
        with use_seed(self.seed, device):
            for first in range(0, recording.length, STARTS_AT_ONCE):
                rows = slice(first, min(first + STARTS_AT_ONCE, recording.length))
                after = slice(rows.start + 1, rows.stop + 1)
                obs: Any = {
                    key: torch.as_tensor(array[after], device=device)
                    for key, array in recording.obs.items()
                }
                action = torch.as_tensor(recording.actions[rows], device=device)
                state, obs = recording.states[rows], obs.get("", obs)
                if (probs := self._call("latent_probs", state, action, obs)) is None:
                    return None
                predicted, inferred = (p.float().clamp(min=1e-8) for p in probs)
                divergence = inferred * (inferred.log() - predicted.log())
                found.append(_to_numpy(divergence.flatten(1).sum(1)))
        return np.concatenate(found)

    @torch.no_grad()
    def decode(self, states: LatentState) -> Mapping[str, Any]:
        """Return what the model decodes from states [B]; empty if that fails."""
        return self._call("decode", states) or {}

    @torch.no_grad()
    def imagine(self, recording: Recording, every: int, horizon: int) -> Imagined:
        """Imagine `horizon` steps from every `every`-th row that has an action."""
        starts = list(range(0, recording.length, every))
        shape = (len(starts), horizon + 1)
        rewards, continues, values, errors = np.full((4, *shape), np.nan, np.float32)
        result = Imagined(every, rewards, continues, values, errors)
        has_values = False
        device = recording.states.features.device
        padded = np.pad(recording.actions, ((0, horizon), (0, 0)))
        with use_seed(self.seed, device):
            for first in range(0, len(starts), STARTS_AT_ONCE):
                part = np.array(starts[first : first + STARTS_AT_ONCE])
                window = part[None] + np.arange(horizon)[:, None]  # [H, B]
                actions = torch.as_tensor(padded[window], device=device)  # [H, B, A]
                index = torch.as_tensor(part, device=device)
                path = self.model.imagine(recording.states[index], actions)
                rows = slice(first, first + len(part))
                rewards[rows, 1:] = _to_numpy(path.rewards).reshape(horizon, -1).T
                continues[rows, 1:] = _to_numpy(path.continues).reshape(horizon, -1).T
                for h, state in enumerate(path.states):
                    inside = part + h <= recording.length
                    self._compare(result, recording, state, part, h, rows)
                    if (value := self._call("value", state)) is not None:
                        has_values = True
                        values[rows, h] = _to_numpy(value).reshape(-1)
                    for array in (rewards, continues, values):
                        array[rows, h][~inside] = np.nan
        if not has_values:
            result.values = None
        return result

    def _compare(
        self,
        result: Imagined,
        recording: Recording,
        state: LatentState,
        starts: np.ndarray,
        h: int,
        rows: slice,
    ) -> None:
        """Fill column `h` with the errors of the states [B] and of what is decoded from them."""
        inside = starts + h <= recording.length
        at = np.minimum(starts + h, recording.length)
        true = recording.states.features[torch.as_tensor(at, device=state.features.device)].float()
        distance = (state.features.float() - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-8)
        result.state_errors[rows, h] = np.where(inside, _to_numpy(distance), np.nan)
        decoded = self.decode(state)
        if h == 0:
            for name, array in (("reward", result.rewards), ("continue", result.continues)):
                if name in decoded:
                    array[rows, 0] = _to_numpy(decoded[name]).reshape(-1)
        for key, guess in name_arrays(decoded.get("obs")).items():
            values = _to_numpy(guess)
            if key not in recording.obs or values.shape[1:] != recording.obs[key].shape[1:]:
                continue
            real = recording.obs[key][at].astype(np.float32)
            error = np.sqrt(np.square(values - real).reshape(len(at), -1).mean(1))
            images = real.ndim == 4
            values = to_rgb(values) if images else values
            if key not in result.obs:
                size = (*result.rewards.shape, *values.shape[1:])
                empty = np.zeros(size, np.uint8) if images else np.full(size, np.nan, np.float32)
                result.obs[key] = empty
                result.errors[key] = np.full_like(result.rewards, np.nan)
            result.errors[key][rows, h] = np.where(inside, error, np.nan)
            result.obs[key][rows, h][inside] = values[inside]

    def _call(self, name: str, *args: Any) -> Any:
        """Return what a method of the model returns; None if it has no such method, or it fails."""
        method: Callable[..., Any] | None = getattr(self.model, name, None)
        if name in self._failed or not callable(method):
            return None
        try:
            return method(*args)
        except Exception as error:
            self._failed.add(name)
            kind = type(self.model).__name__
            self.notes.append(
                f"{kind}.{name} raised {type(error).__name__}, so its predictions are missing: "
                f"{error}"
            )
        return None


def name_arrays(obs: Any) -> Mapping[str, Tensor]:
    """Return decoded observations by key; "" is the key of a single array."""
    if obs is None:
        return {}
    return obs if isinstance(obs, Mapping) else {"": obs}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
