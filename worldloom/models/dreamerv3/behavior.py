"""Actor and critic learning of DreamerV3, on imagined and on replayed steps.

Equation numbers are those of arXiv:2301.04104v2. Axes: N imagined trajectories, H imagined steps,
K replayed steps used as starting states, F features, A action width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldloom.models.dreamerv3.heads import Actor, Policy
from worldloom.models.dreamerv3.rssm import RSSM
from worldloom.nn.normalizer import Normalizer
from worldloom.nn.products import product_type
from worldloom.nn.returns import lambda_return
from worldloom.nn.twohot import twohot_loss, twohot_mean


@dataclass
class Imagined:
    """Head outputs at the imagined states 0..H; state 0 is the replayed starting state.

    actions: [N, H, A] taken in states 0..H-1; policy: the distributions they were drawn from.
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


@dataclass
class Targets:
    """Learning targets of actor and critic, without gradient.

    weight: [N, H] discounted probability that the episode reaches the state.
    returns: [N, H] lambda-returns; advantage, value: [N, H] normalised advantages and returns.
    """

    weight: Tensor
    returns: Tensor
    advantage: Tensor
    value: Tensor
    stats: dict[str, Tensor]


def rollout(rssm: RSSM, actor: Actor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Policy]:
    """Roll out the policy in imagination from features [N, F], which may carry gradient.

    Returns features [N, H + 1, F], actions [N, H, A] and the policy in the first H states. Only the
    policy has a graph, because the official code stops all gradients through the rollout. Each
    state therefore needs one evaluation of the actor, for acting and for learning.
    """
    rows, width = start.shape
    # In mixed precision every reader would cast them.
    dtype = product_type(start)
    features = start.new_empty(rows, steps + 1, width, dtype=dtype)
    # `.data`: autograd would report writing a later step as a modification of the earlier ones.
    slots = [slot.data for slot in features.unbind(1)]  # views [N, F]
    slots[0].copy_(start.detach())
    deter, stoch = start.detach().split([rssm.deter, width - rssm.deter], 1)
    actions, policies, state = [], [], start
    with torch.no_grad():
        kernels = rssm.kernels()
    for t in range(steps):
        policies.append(actor(state))
        with torch.no_grad():
            actions.append(policies[t].sample())
            deter, stoch, _ = rssm.imagine_step(deter, stoch, actions[t], kernels)
            # Products in bfloat16 may read beyond a row, where a slot has no values yet.
            state = torch.cat([deter.to(dtype), stoch.to(dtype)], 1)
            slots[t + 1].copy_(state)
    if start.requires_grad:
        features = torch.cat([start.to(dtype).unsqueeze(1), features[:, 1:]], 1)
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

    The actor follows REINFORCE with normalised advantages and an entropy bonus (eq. 6). The critic
    predicts the lambda-returns (eq. 5) and the output of its slow copy. Both losses are weighted by
    the probability that the episode reaches the state. With `contdisc` the continue head predicts
    the discount too. `update` updates the normalisers.
    """
    disc = 1.0 if contdisc else 1 - 1 / horizon
    with torch.no_grad():
        targets = _learning_targets(imagined, norms, update, disc, lam, slowtar)

    entropy = imagined.policy.entropy()  # {action: [N, H]}
    log_prob = imagined.policy.log_prob(imagined.actions)  # [N, H]
    bonus = actent * torch.stack(list(entropy.values())).sum(0)
    policy_loss = -targets.weight * (log_prob * targets.advantage + bonus)

    critic_loss = _critic_loss(imagined.value_logits, targets.value, imagined.slow_value, slowreg)
    value_loss = targets.weight * critic_loss

    stats = targets.stats | _entropy_stats(imagined.policy, entropy)
    return {"policy": policy_loss, "value": value_loss}, targets.returns, stats


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
    """Return the critic's loss on replayed steps [B, K - 1] and its targets [B, K - 1].

    value_logits [B, K, bins] carry gradient into the world model. The replayed lambda-returns
    bootstrap on boot [B, K], the imagined returns from each step; `slowtar` therefore has no effect
    here, as in the official code.
    """
    with torch.no_grad():
        last, term = last.to(boot.dtype), term.to(boot.dtype)
        returns = lambda_return(last, term, reward.to(boot.dtype), boot, 1 - 1 / horizon, lam)
        offset, scale = _track(values, returns, update)
        target = (returns - offset) / scale
    loss = _critic_loss(value_logits, target, slow_value, slowreg)
    return (1 - last[:, :-1]) * loss, returns


def _learning_targets(
    imagined: Imagined, norms: Normalizers, update: bool, disc: float, lam: float, slowtar: bool
) -> Targets:
    # Values in units of return, [N, H + 1].
    offset, scale = norms.values.stats()
    value = twohot_mean(imagined.value_logits) * scale + offset
    slow_value = imagined.slow_value * scale + offset
    baseline = slow_value if slowtar else value

    # Lambda-returns (eq. 5), [N, H]; imagined trajectories are never truncated.
    cont, reward = imagined.cont, imagined.reward
    weight = torch.cumprod(disc * cont, 1) / disc  # [N, H + 1]
    last = torch.zeros_like(cont)
    returns = lambda_return(last, 1 - cont, reward, baseline, disc, lam)

    # Advantages divided by the range of returns (eqs. 6-7), [N, H].
    ret_offset, ret_scale = _track(norms.returns, returns, update)
    advantage = (returns - baseline[:, :-1]) / ret_scale
    adv_offset, adv_scale = _track(norms.advantages, advantage, update)

    # Targets of the critic, [N, H].
    offset, scale = _track(norms.values, returns, update)
    target = (returns - offset) / scale

    normed = (returns - ret_offset) / ret_scale
    stats = {
        "adv": advantage.mean(),
        "adv_std": advantage.std(correction=0),
        "adv_mag": advantage.abs().mean(),
        "rew": reward.mean(),
        "con": cont.mean(),
        "ret": normed.mean(),
        "ret_min": normed.min(),
        "ret_max": normed.max(),
        "ret_rate": (normed.abs() >= 1).to(normed.dtype).mean(),
        "val": value.mean(),
        "tar": target.mean(),
        "slowval": slow_value.mean(),
        "weight": weight.mean(),
    }
    return Targets(weight[:, :-1], returns, (advantage - adv_offset) / adv_scale, target, stats)


def _track(norm: Normalizer, x: Tensor, update: bool) -> tuple[Tensor, Tensor]:
    """Return offset and scale of a normaliser, updated with x first if `update`."""
    if update:
        norm.update(x)
    return norm.stats()


def _critic_loss(logits: Tensor, target: Tensor, slow_value: Tensor, slowreg: float) -> Tensor:
    """Return the two-hot loss [N, H] to the target plus `slowreg` times that to the slow critic.

    logits [N, H + 1, bins] and slow_value [N, H + 1] include the last state, target [N, H] does
    not.
    """
    # Slicing the loss rather than the logits saves a copy of the logits.
    padded = torch.cat([target, slow_value[:, -1:]], 1)
    return twohot_loss(logits, padded, slow_value, weights=(1.0, slowreg))[:, :-1]


def _entropy_stats(policy: Policy, entropy: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean entropy of each action, and its position between minimum and maximum."""
    stats = {}
    for key, value in entropy.items():
        mean = value.detach().mean()
        low, high = policy.dists[key].entropy_bounds()
        stats[f"ent/{key}"] = mean
        stats[f"rand/{key}"] = (mean - low) / max(high - low, 1e-8)
    return stats
