"""Loss terms that subclasses add to those of a built-in model."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from worldloom.errors import suggest
from worldloom.protocol import Batch


class ExtraLosses:
    """The hook `auxiliary_losses`, which a subclass overrides to add loss terms."""

    def auxiliary_losses(self, batch: Batch, features: Tensor) -> dict[str, Tensor]:
        """Return further loss terms by name, each a scalar or with one value per row and step.

        Every term is averaged, multiplied by `loss_scales[name]` (1 if it is not set), added to
        "loss", and returned by `compute_loss` without this weight as "NAME_loss".

        batch: the batch [B, T', ...] that `compute_loss` received; not to be modified.
        features: [B, T, F] latent states of its last T rows, with gradient.
        """
        return {}

    def compute_auxiliary(
        self, batch: Batch, features: Tensor, own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the terms of `auxiliary_losses`, after checking them.

        own: the model's other terms, whose names are taken.

        Raises:
            ValueError: the result is not a dict of tensors and numbers, or has a name twice.
        """
        where = f"{type(self).__name__}.auxiliary_losses"
        terms: Any = self.auxiliary_losses(batch, features)
        if not isinstance(terms, Mapping):
            raise ValueError(f"{where} returned {terms!r}; expected a dict {{name: tensor}}")
        for name, term in terms.items():
            if not isinstance(term, Tensor | int | float):
                raise ValueError(
                    f"{where} returned a {type(term).__name__} for {name!r}; expected a tensor"
                )
            if name in own:
                raise ValueError(
                    f"{where} returned {name!r}, which is a term of {type(self).__name__} already; "
                    "choose another name"
                )
        return {
            name: term if isinstance(term, Tensor) else features.new_full((), float(term))
            for name, term in terms.items()
        }

    @property
    def has_auxiliary_losses(self) -> bool:
        """Whether the hook is overridden; features are computed for it only then."""
        hook = getattr(self.auxiliary_losses, "__func__", None)
        return hook is not ExtraLosses.auxiliary_losses


def name_extra(losses: Mapping[str, Any], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return extra terms, detached, under the names that `compute_loss` returns: "NAME_loss".

    losses: what it returns otherwise.

    Raises:
        ValueError: a term would replace one of these losses.
    """
    named = {}
    for term, value in terms.items():
        name = term if term.endswith("_loss") else f"{term}_loss"
        if name in losses or name in named:
            raise ValueError(
                f"the extra loss term {term!r} would be logged as {name!r}, which the model "
                "returns already; choose another name"
            )
        named[name] = value.detach()
    return named


def warn_unused(scales: Mapping[str, float], terms: Collection[str]) -> None:
    """Warn of names in `loss_scales` that belong to none of an update's terms."""
    used = {*terms, *(term.split("/")[0] for term in terms)}
    if unused := [name for name in scales if name not in used]:
        warnings.warn(
            f"loss_scales has {unused[0]!r}, but the loss has no such term"
            f"{suggest(unused[0], terms)}; its terms are {', '.join(terms)}",
            stacklevel=3,
        )
