"""Losses that shape DreamerV3's latents without a decoder.

R2-Dreamer (Morihira et al., ICLR 2026; NM512/r2dreamer, commit 546e4fa) compares three of them:
redundancy reduction ("r2dreamer"), a contrastive loss ("infonce") and prototypes ("dreamerpro", in
`dreamerpro`). Only the loss is theirs; everything else is DreamerV3's. A loss of a user's own is a
subclass of `Representation`.

Axes: B batch rows, T time steps, E tokens, F features of the posterior, N = B * T rows, those of
all ranks if there are several.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.dreamerv3.sequences import Sequences
from worldloom.nn.layers import init_kernel, to_float32
from worldloom.ranks import gather_rows, gather_rows_with_gradient, rank

if TYPE_CHECKING:
    from worldloom.models.dreamerv3.model import DreamerV3


@dataclass
class Posterior:
    """What a representation loss sees of a batch; tokens and features carry gradient.

    sequences: the batch. tokens: [B, T, E] of the encoder. features: [B, T, F] of the posterior
    states, deter and stoch.
    """

    sequences: Sequences
    tokens: Tensor
    features: Tensor


class Representation(nn.Module):
    """A loss that makes latent states represent observations, with the weights that it needs.

    It is a part of the model that it shapes. The arguments of a subclass after `model` are its
    hyperparameters.

    model: with encoder and RSSM, but not yet its heads. It is not to be kept, because it contains
        this module; the methods receive it again.
    """

    def __init__(self, model: "DreamerV3") -> None:
        super().__init__()

    def compute_terms(self, model: "DreamerV3", posterior: Posterior) -> dict[str, Tensor]:
        """Return loss terms by name, each a scalar or one value per row and step [B, T].

        The model multiplies each term by `loss_scales[NAME]` (1 if it is not set), adds it to
        "loss" and returns its mean as "NAME_loss". In mixed precision this is called under
        autocast. Statistics of the whole batch have to be those of all ranks
        (`worldloom.ranks.gather_rows`).
        """
        raise NotImplementedError

    def after_update(self, model: "DreamerV3") -> None:
        """Change what the optimiser does not, such as copies; called after each of its steps."""


class Projection(nn.Linear):
    """A linear map of the features to the width of the tokens, computed in float32."""

    def __init__(self, model: "DreamerV3") -> None:
        super().__init__(model.feature_dim, model.encoder.width, bias=False)

    def reset_parameters(self) -> None:
        """Initialise the weight as those of all layers."""
        init_kernel(self.weight, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Map features [B, T, F] to [N, E]."""
        return super().forward(to_float32(input)).flatten(0, 1)


class Barlow(Representation):
    """Redundancy reduction: projected features and tokens correlate column by column only.

    Tokens get no gradient: the encoder learns through the features.

    lambd: weight of the elements off the diagonal of their cross-correlation.
    """

    def __init__(self, model: "DreamerV3", *, lambd: float = 5e-4) -> None:
        super().__init__(model)
        self.lambd = lambd
        self.proj = Projection(model)

    def compute_terms(self, model: "DreamerV3", posterior: Posterior) -> dict[str, Tensor]:
        """Return the term "barlow" []."""
        with in_float32(posterior.tokens):
            tokens = to_float32(posterior.tokens).flatten(0, 1)
            return {"barlow": barlow_loss(self.proj(posterior.features), tokens, self.lambd)}


class InfoNCE(Representation):
    """Contrast: of the tokens of all rows, a state's own have the largest product with it.

    Tokens get no gradient: the encoder learns through the features.
    """

    def __init__(self, model: "DreamerV3") -> None:
        super().__init__(model)
        self.proj = Projection(model)

    def compute_terms(self, model: "DreamerV3", posterior: Posterior) -> dict[str, Tensor]:
        """Return the term "infonce" []."""
        with in_float32(posterior.tokens):
            tokens = to_float32(posterior.tokens).flatten(0, 1)
            return {"infonce": infonce_loss(self.proj(posterior.features), tokens)}


def in_float32(like: Tensor) -> AbstractContextManager[Any]:
    """Return the context in which products are not rounded to half precision."""
    if not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def barlow_loss(projected: Tensor, tokens: Tensor, lambd: float) -> Tensor:
    """Return the loss [] of projections [N, E] of states, given their tokens [N, E].

    Tokens get no gradient. Zbontar et al. 2021, "Barlow Twins", with sums over the elements of the
    correlation.
    """
    ours = standardize(gather_rows_with_gradient(projected))
    theirs = standardize(gather_rows(tokens.detach()))
    correlation = ours.t() @ theirs / len(ours)
    diagonal = correlation.diagonal()
    redundancy = correlation.square().sum() - diagonal.square().sum()
    return (diagonal - 1).square().sum() + lambd * redundancy


def standardize(x: Tensor) -> Tensor:
    """Give each column of [N, E] mean 0 and standard deviation 1; a constant column becomes 0."""
    return (x - x.mean(0)) / (x.std(0) + 1e-8)


def infonce_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss [] of projections [N, E] of states, given their tokens [N, E].

    Tokens get no gradient. The other rows are the negatives, those of the same sequence included.
    """
    logits = projected @ gather_rows(tokens.detach()).t()
    own = torch.arange(len(logits), device=logits.device) + rank() * len(logits)
    return F.cross_entropy(logits, own)
