"""Weights and public names of DreamerV3's loss terms."""

import torch
from torch import Tensor

from worldloom.models.extra_losses import name_extra, warn_unused

# Official terms, and the names under which `compute_loss` returns their means.
NAMES = {
    "dyn": "dyn_loss",
    "rep": "rep_loss",
    "rew": "reward_loss",
    "con": "continue_loss",
    "policy": "policy_loss",
    "value": "value_loss",
    "repval": "replay_value_loss",
}


def name_losses(
    terms: dict[str, Tensor], scales: dict[str, float], single_obs: bool
) -> dict[str, Tensor]:
    """Return the total loss, two weighted groups and the mean of each term by public name.

    Reconstruction terms are named "rec/KEY" and share the scale "rec". With a single unnamed
    observation their only mean is "reconstruction_loss". Terms that are not official have the scale
    1 if `scales` has no other, and get the public name "NAME_loss".
    """
    means = {name: term.mean() for name, term in terms.items()}
    weighted = {name: mean * _find_scale(scales, name) for name, mean in means.items()}
    recs = [name for name in means if name.startswith("rec/")]
    losses = {"loss": torch.stack(list(weighted.values())).sum()}
    if kl := [weighted[name] for name in ("dyn", "rep") if name in weighted]:
        losses["kl_loss"] = sum(kl[1:], kl[0]).detach()
    if recs:
        losses["reconstruction_loss"] = torch.stack([weighted[n] for n in recs]).sum().detach()
    names = dict(NAMES)
    if not single_obs:
        names |= {name: f"reconstruction_loss/{name.removeprefix('rec/')}" for name in recs}
    losses |= {names[k]: v.detach() for k, v in means.items() if k in names}
    extra = {k: v for k, v in means.items() if k not in NAMES and k not in recs}
    if more := [name for name in scales if name not in NAMES and name != "rec"]:
        warn_unused({name: scales[name] for name in more}, extra)
    return losses | name_extra(losses, extra)


def _find_scale(scales: dict[str, float], name: str) -> float:
    """Return the weight of a term: that of its name, or of the part before "/", or else 1."""
    return scales.get(name, scales.get(name.split("/")[0], 1.0))
