"""Prototypes instead of a decoder: DreamerPro (Deng et al. 2022) as R2-Dreamer implements it.

Two shifted views of a batch are assigned to prototypes. The assignment of one view, computed by
slow copies, is to be predicted from the observations of the other and from states of the same view.

Axes as in `representation`, and K prototypes, P their width, R = 2 B rows of both views.
"""

import copy
import dataclasses
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.dreamerv3.representation import Posterior, Representation, in_float32
from worldloom.models.dreamerv3.sequences import Sequences
from worldloom.nn.layers import to_float32
from worldloom.nn.shifts import draw_shifts, shift_images
from worldloom.ranks import gather_rows, rank

if TYPE_CHECKING:
    from worldloom.models.dreamerv3.model import DreamerV3


class Prototypes(Representation):
    """Loss terms "swav", "temp" and "norm" over two views of the batch.

    num_prototypes, proto_dim: K and P. temperature: of the predicted assignments.
    sinkhorn_eps, sinkhorn_iters: of the algorithm that gives each prototype the same share of a
        view.
    warm_up: first steps of a sequence that are not assigned.
    freeze_prototypes_iters: the prototypes first move in the update before this number.
    ema_update_every, ema_update_fraction: interval of the moves of the slow copies, in updates, and
        their step size.
    max_delta: largest shift of an image in pixels, in each direction.
    same_across_time: draw one shift for each sequence instead of one for each step.
    """

    def __init__(
        self,
        model: "DreamerV3",
        *,
        num_prototypes: int = 2500,
        proto_dim: int = 32,
        temperature: float = 0.1,
        sinkhorn_eps: float = 0.05,
        sinkhorn_iters: int = 3,
        warm_up: int = 1,
        freeze_prototypes_iters: int = 10_000,
        ema_update_every: int = 1,
        ema_update_fraction: float = 0.05,
        max_delta: int = 3,
        same_across_time: bool = True,
    ) -> None:
        super().__init__(model)
        self.temperature, self.sinkhorn = temperature, (sinkhorn_eps, sinkhorn_iters)
        self.warm_up, self.freeze = warm_up, freeze_prototypes_iters
        self.ema_every, self.ema_rate = ema_update_every, ema_update_fraction
        self.max_delta, self.same_across_time = max_delta, same_across_time
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, proto_dim))
        self.obs_proj = nn.Linear(model.encoder.width, proto_dim)
        self.feat_proj = nn.Linear(model.feature_dim, proto_dim)
        self.slow_encoder = copy.deepcopy(model.encoder).requires_grad_(False)
        self.slow_proj = copy.deepcopy(self.obs_proj).requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor
        self.rescale()

    @torch.no_grad()
    def rescale(self) -> None:
        """Rescale the prototypes to unit length, in place."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=-1))

    @torch.no_grad()
    def move_copies(self, model: "DreamerV3", rate: Tensor) -> None:
        """Move the slow copies towards encoder and projection by a share `rate` [] of the way."""
        slow: list[Tensor] = [*self.slow_encoder.parameters(), *self.slow_proj.parameters()]
        fast: list[Tensor] = [*model.encoder.parameters(), *self.obs_proj.parameters()]
        # A list, because torch reads a single tensor on the host.
        torch._foreach_lerp_(slow, fast, [rate] * len(slow))

    def after_update(self, model: "DreamerV3") -> None:
        """Rescale the prototypes; move the slow copies if that is due."""
        self.count += 1
        self.rescale()
        is_due = self.count % self.ema_every == 0
        self.move_copies(model, is_due.to(self.prototypes.dtype) * self.ema_rate)

    def compute_terms(self, model: "DreamerV3", posterior: Posterior) -> dict[str, Tensor]:
        """Return the terms "swav", "temp" and "norm", each []."""
        views = self.make_views(posterior.sequences)
        tokens = model.encoder(views.obs)
        deter, stoch, _ = model.rssm.observe(
            views.deter, views.stoch, tokens, views.prev_actions, views.is_first
        )
        with torch.no_grad():
            slow = self.slow_encoder(views.obs)
        with in_float32(tokens):
            observed = self.obs_proj(to_float32(tokens))  # [R, T, P]
            predicted = self.feat_proj(to_float32(torch.cat([deter, stoch], -1)))
            return self.compare(observed, predicted, self.slow_proj(to_float32(slow)))

    def compare(self, observed: Tensor, predicted: Tensor, slow: Tensor) -> dict[str, Tensor]:
        """Return the terms for projections [R, T, P] of tokens, of features and of slow tokens."""
        steps = slice(self.warm_up, None)
        awake = (self.count + 1 >= self.freeze).to(self.prototypes.dtype)
        # A frozen prototype has a gradient of zero, not none: the optimiser counts it.
        moving = self.prototypes - self.prototypes.detach()
        centers = F.normalize(self.prototypes.detach() + awake * moving, dim=-1, eps=1e-12)

        def scores(x: Tensor) -> Tensor:
            return F.normalize(x, dim=-1, eps=1e-12)[:, steps] @ centers.t()  # [R, T - w, K]

        log_observed, log_predicted = (
            F.log_softmax(scores(x) / self.temperature, -1) for x in (observed, predicted)
        )
        with torch.no_grad():
            first, second = (assign(view, *self.sinkhorn) for view in scores(slow).chunk(2))
        log_first, log_second = log_observed.chunk(2)
        swapped = (second * log_first).sum(-1).mean() + (first * log_second).sum(-1).mean()
        same = (torch.cat([first, second]) * log_predicted).sum(-1).mean()
        norm = sum((x.norm(dim=-1) - 1).square().mean() for x in (observed, predicted))
        return {"swav": -swapped / 2, "temp": -same, "norm": torch.as_tensor(norm)}

    def make_views(self, seq: Sequences) -> Sequences:
        """Return both views of sequences, one after the other on the batch axis."""
        twice = {
            field.name: torch.cat([getattr(seq, field.name)] * 2)
            for field in dataclasses.fields(seq)
            if field.name != "obs"
        }
        obs = {key: torch.cat([value, value]) for key, value in seq.obs.items()}
        images = [key for key, value in obs.items() if value.ndim == 5]
        if images:
            rows, steps = obs[images[0]].shape[:2]
            count = rows if self.same_across_time else rows * steps
            shifts = draw_shifts(count, 2 * self.max_delta, seq.rewards.device)
        for key in images:
            obs[key] = shift_sequences(obs[key], shifts, self.max_delta)
        return Sequences(obs, **twice)


def shift_sequences(images: Tensor, shifts: Tensor, pad: int) -> Tensor:
    """Shift images [R, T, C, H, W], with shifts [R, 2] of sequences or [R * T, 2] of steps."""
    planes = images.reshape(len(shifts), -1, *images.shape[-2:])
    return shift_images(planes, shifts, pad).reshape(images.shape)


def assign(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return soft assignments [B, T, K] of one view: each row sums to 1 (Sinkhorn and Knopp).

    scores: [B, T, K]. Each prototype gets about the same share of the rows of all ranks.
    """
    every = gather_rows(scores.flatten(0, 1))  # [M, K]
    count, prototypes = every.shape
    z = every / epsilon
    z = z - z.logsumexp((0, 1))
    for _ in range(iterations):
        z = z - z.logsumexp(0, keepdim=True) - math.log(prototypes)
        z = z - z.logsumexp(1, keepdim=True) - math.log(count)
    own = z[rank() * scores.shape[0] * scores.shape[1] :][: scores.shape[0] * scores.shape[1]]
    return (own + math.log(count)).exp().view_as(scores)
