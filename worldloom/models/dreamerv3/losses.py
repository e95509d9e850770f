"""Weights and public names of DreamerV3's loss terms."""

import torch
from torch import Tensor

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
    observation their only mean is "reconstruction_loss".
    """
    means = {name: term.mean() for name, term in terms.items()}
    weighted = {name: mean * scales[name.split("/")[0]] for name, mean in means.items()}
    recs = [name for name in means if name.startswith("rec/")]
    losses = {
        "loss": torch.stack(list(weighted.values())).sum(),
        "kl_loss": (weighted["dyn"] + weighted["rep"]).detach(),
        "reconstruction_loss": torch.stack([weighted[name] for name in recs]).sum().detach(),
    }
    names = dict(NAMES)
    if not single_obs:
        names |= {name: f"reconstruction_loss/{name.removeprefix('rec/')}" for name in recs}
    return losses | {names[k]: v.detach() for k, v in means.items() if k in names}
