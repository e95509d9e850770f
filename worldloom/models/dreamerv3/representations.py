"""The choices of DreamerV3's `representation`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from worldloom.errors import suggest
from worldloom.models.dreamerv3.dreamerpro import Prototypes
from worldloom.models.dreamerv3.representation import Barlow, InfoNCE, Posterior, Representation
from worldloom.records import import_target, list_parameters

if TYPE_CHECKING:
    from worldloom.models.dreamerv3.model import DreamerV3

# "decoder" is the loss of the model itself.
NAMED: dict[str, type[Representation]] = {
    "r2dreamer": Barlow,
    "infonce": InfoNCE,
    "dreamerpro": Prototypes,
}


def build_representation(
    model: "DreamerV3", option: str | Mapping[str, Any]
) -> Representation | None:
    """Return the representation loss that the option names; None for "decoder".

    option: "decoder", a name in NAMED, or {"name": one of them, or "_target_": the import path of a
        subclass of Representation, and its hyperparameters}.

    Raises:
        ValueError: the option or a hyperparameter is unknown, or the class is no Representation.
    """
    given = {"name": option} if isinstance(option, str) else dict(option)
    target, name = given.pop("_target_", None), given.pop("name", None)
    if target is None and name == "decoder" and not given:
        return None
    if (target is None) == (name is None) or (target is None and name not in NAMED):
        names = ", ".join(("decoder", *NAMED))
        raise ValueError(
            f"representation is {option!r}{suggest(str(name), ('decoder', *NAMED))}; expected one "
            f"of {names}, or _target_=my_pkg.MyLoss with its hyperparameters"
        )
    try:
        cls = NAMED[str(name)] if target is None else import_target(str(target))
    except ValueError as error:
        raise ValueError(f"representation._target_: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Representation)):
        raise ValueError(
            f"representation._target_ is {target}; expected a subclass of "
            "worldloom.models.dreamerv3.representation.Representation"
        )
    known, takes_any = list_parameters(cls)
    takes = [parameter for parameter in known if parameter != "model"]
    if wrong := [key for key in given if key not in takes and not takes_any]:
        raise ValueError(
            f"representation {name or target} has no hyperparameter {wrong[0]!r}"
            f"{suggest(wrong[0], takes)}; it takes {', '.join(takes) or 'none'}"
        )
    return cls(model, **given)


def represent(
    model: "DreamerV3", posterior: Posterior, deter: Tensor, stoch: Tensor
) -> dict[str, Tensor]:
    """Return the terms that make deter [B, T, D] and stoch [B, T, S * C] represent observations.

    These are reconstructions "rec/KEY" [B, T], or those of the representation loss; next to it a
    decoder is a probe, whose gradient stays in it.
    """
    terms: dict[str, Tensor] = {}
    if model.representation is not None:
        terms = dict(model.representation.compute_terms(model, posterior))
        deter, stoch = deter.detach(), stoch.detach()
    if model.decoder is not None:
        for key, out in model.decoder(deter, stoch).items():
            terms[f"rec/{key}"] = model.decoder.loss(key, out, posterior.sequences.obs[key])
    return terms
