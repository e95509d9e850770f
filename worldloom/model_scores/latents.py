"""Scores of discrete latents: surprise at observations, and classes without a use.

Letters used in shapes: N sequences, O observed rows of each, S latent variables with C classes.
"""

from typing import Any

from worldloom.model_scores.sequences import Sequences
from worldloom.protocol import LatentState
from worldloom.trees import map_tree

LEAST_PROBABILITY = 1e-6  # smaller ones count as this, so that the divergence is finite
UNUSED = 0.1  # a class is used if it has at least this share of a uniform probability, on average


def score_latents(model: Any, sequences: Sequences, states: list[LatentState]) -> dict[str, float]:
    """Return {"kl", "unused_classes"}; empty if the model has no `latent_probs`.

    "kl": divergence of the inferred from the predicted latents of a step, in nats, summed over the
    S variables. "unused_classes": share of the classes that are improbable in all rows.

    states: O states [N] after the observed rows.
    """
    if not callable(getattr(model, "latent_probs", None)):
        return {}
    rows = map_tree(lambda x: x[:, : sequences.observed], sequences.rows)
    informed = sequences.informed[:, : sequences.observed - 1]
    known = (informed & ~rows["is_first"][:, 1:]).t()  # [O - 1, N]
    if not known.any():
        return {}
    before = LatentState.cat(states[:-1])[known.flatten()]
    obs = map_tree(lambda x: x[:, 1:].transpose(0, 1)[known], rows["obs"])
    actions = rows["actions"][:, :-1].transpose(0, 1)[known]
    predicted, inferred = (p.float() for p in model.latent_probs(before, actions, obs))
    p, q = inferred.clamp(min=LEAST_PROBABILITY), predicted.clamp(min=LEAST_PROBABILITY)
    divergence = (inferred * (p.log() - q.log())).sum((-2, -1))
    unused = inferred.mean(0) < UNUSED / inferred.shape[-1]
    return {"kl": divergence.mean().item(), "unused_classes": unused.float().mean().item()}
