"""Actor and critic learning of DreamerV3: losses on imagined and on replayed steps.

Axes: N imagined trajectories, H imagined steps, K replayed steps used as starts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldloom.models.dreamerv3.networks import Actor, Policy
from worldloom.models.dreamerv3.rssm import RSSM
from worldloom.nn.normalizer import Normalizer
from worldloom.nn.returns import lambda_return
from worldloom.nn.twohot import twohot_loss, twohot_mean


@dataclass
class Imagined:
    """What the heads say of imagined states 0..H, the first being the replayed start.

    actions: [N, H, A] taken at states 0..H-1; policy: its distributions at the same states.
    reward, cont, slow_value: [N, H + 1] predictions without gradient.
    value_logits: [N, H + 1, bins] of the critic, with gradient.
    """

    actions: Tensor
    policy: Policy
    reward: Tensor
    cont: Tensor
    value_logits: Tensor
    slow_value: Tensor


@dataclass
class Normalizers:
    """Running scales of returns, values and advantages."""

    returns: Normalizer
    values: Normalizer
    advantages: Normalizer


def rollout(rssm: RSSM, actor: Actor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Policy]:
    """Let the policy act in imagination from features [N, F], which may carry gradient.

    Returns features [N, H + 1, F], actions [N, H, A] and the policy at the first H states. The
    policy alone has a graph: the official code stops every gradient that would pass through the
    rollout. So it is evaluated once, to act and to learn.
    """
    rows, width = start.shape
    features = start.new_empty(rows, steps + 1, width)
    # `.data`, because autograd takes a later step's entry for a change of the earlier ones.
    states = [state.data for state in features.unbind(1)]
    states[0].copy_(start.detach())
    deter, stoch = start.detach().split([rssm.deter, width - rssm.deter], 1)
    actions, policies = [], []
    with torch.no_grad():
        kernels = rssm.kernels()
    for t in range(steps):
        policies.append(actor(states[t] if t else start))
        with torch.no_grad():
            actions.append(policies[t].sample())
            deter, stoch, _ = rssm.imagine_step(deter, stoch, actions[t], kernels)
        torch.cat([deter, stoch], 1, out=states[t + 1])
    if start.requires_grad:
        features = torch.cat([start.unsqueeze(1), features[:, 1:]], 1)
    return features, torch.stack(actions, 1), Policy.stack(policies)


def imagination_losses(
    imagined: Imagined,
    norms: Normalizers,
    *,
    update: bool,
    contdisc: bool,
    horizon: float,
    lam: float,
    actent: float,
    slowreg: float,
    slowtar: bool,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Return the losses "policy" and "value" [N, H], the lambda-returns [N, H] and statistics.

    Paper eqs. 6-11. The actor follows REINFORCE with advantages divided by the return range; the
    critic predicts the returns and its own slow copy. Each step is weighted by the probability
    that the episode reaches it. With `contdisc` the continue head contains the discount.
    """
    offset, scale = norms.values.stats()
    with torch.no_grad():
        value = twohot_mean(imagined.value_logits) * scale + offset
        slow_value = imagined.slow_value * scale + offset
        target = slow_value if slowtar else value
        disc = 1.0 if contdisc else 1 - 1 / horizon
        cont = imagined.cont
        weight = torch.cumprod(disc * cont, 1)[:, :-1] / disc
        last = torch.zeros_like(cont)
        returns = lambda_return(last, 1 - cont, imagined.reward, target, disc, lam)
        if update:
            norms.returns.update(returns)
        ret_offset, ret_scale = norms.returns.stats()
        advantage = (returns - target[:, :-1]) / ret_scale
        if update:
            norms.advantages.update(advantage)
        adv_offset, adv_scale = norms.advantages.stats()
        normed_advantage = (advantage - adv_offset) / adv_scale
        if update:
            norms.values.update(returns)
        offset, scale = norms.values.stats()
        normed_target = (returns - offset) / scale

    entropy = imagined.policy.entropy()
    log_prob = imagined.policy.log_prob(imagined.actions)
    bonus = actent * torch.stack(list(entropy.values())).sum(0)
    losses = {
        "policy": -weight * (log_prob * normed_advantage + bonus),
        "value": weight
        * _value_loss(imagined.value_logits, normed_target, imagined.slow_value, slowreg),
    }
    normed = (returns - ret_offset) / ret_scale
    stats = {
        "adv": advantage.mean(),
        "adv_std": advantage.std(correction=0),
        "adv_mag": advantage.abs().mean(),
        "rew": imagined.reward.mean(),
        "con": cont.mean(),
        "ret": normed.mean(),
        "ret_min": normed.min(),
        "ret_max": normed.max(),
        "ret_rate": (normed.abs() >= 1).to(normed.dtype).mean(),
        "val": value.mean(),
        "tar": normed_target.mean(),
        "slowval": slow_value.mean(),
        "weight": (torch.cumprod(disc * cont, 1) / disc).mean(),
    }
    for key, value_ in entropy.items():
        mean = value_.detach().mean()
        low, high = imagined.policy.dists[key].entropy_bounds()
        stats[f"ent/{key}"] = mean
        stats[f"rand/{key}"] = (mean - low) / max(high - low, 1e-8)
    return losses, returns, stats


def replay_value_loss(
    value_logits: Tensor,
    slow_value: Tensor,
    boot: Tensor,
    reward: Tensor,
    last: Tensor,
    term: Tensor,
    values: Normalizer,
    *,
    update: bool,
    horizon: float,
    lam: float,
    slowreg: float,
    slowtar: bool,
) -> tuple[Tensor, Tensor]:
    """Return the critic's loss on replayed steps [B, K - 1] and its returns [B, K - 1].

    value_logits [B, K, bins] carry gradient into the world model; boot [B, K] are the imagined
    returns from each step, on which the replayed lambda-returns bootstrap. `slowtar` has no
    effect on the official returns either: they bootstrap on `boot` alone.
    """
    with torch.no_grad():
        last, term = last.to(boot.dtype), term.to(boot.dtype)
        returns = lambda_return(last, term, reward.to(boot.dtype), boot, 1 - 1 / horizon, lam)
        if update:
            values.update(returns)
        offset, scale = values.stats()
        target = (returns - offset) / scale
    loss = _value_loss(value_logits, target, slow_value, slowreg)
    return (1 - last[:, :-1]) * loss, returns


def _value_loss(logits: Tensor, target: Tensor, slow_value: Tensor, slowreg: float) -> Tensor:
    """Pull the critic towards its target and towards its slow copy (paper, eq. 11).

    logits [N, H + 1, bins], slow_value [N, H + 1]; target and the result [N, H] leave out the last.
    """
    # Cutting the last state's loss off, not its logits, saves a copy of all of them.
    padded = torch.cat([target, slow_value[:, -1:]], 1)
    return twohot_loss(logits, padded, slow_value, weights=(1.0, slowreg))[:, :-1]
