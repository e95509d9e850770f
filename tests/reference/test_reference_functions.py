"""Encoder, recurrence, heads, decoder and acting one by one, against funcs.npz."""

import pytest
import torch
from torch import Tensor

from tests.reference.dreamerv3_format import (
    Agent,
    sampling,
)
from tests.reference.reference_format import (
    Recording,
    agent_folders,
    array,
    below,
    load,
    tensor,
)
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.dreamerv3.heads import Head
from worldloom.nn.distributions import (
    Classes,
    binary_cross_entropy,
    class_entropy,
    kl_divergence,
    sample_straight_through,
    unimix_log_probs,
    unimix_probs,
)
from worldloom.nn.twohot import symexp_bins, twohot_loss, twohot_mean
from worldloom.protocol import LatentState


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_reference_functions(folder: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, "funcs.npz", precision)
    model = agent.build(precision).eval()
    batch = load(folder, "batch.npz")
    with sampling():
        ours = distribution(model, recording)
        with torch.no_grad():
            ours |= sequence(agent, model, recording, batch)
            ours |= steps(agent, model, recording)
            ours |= heads(agent, model, recording)
            ours |= decoder(agent, model, recording, batch)
            ours |= acting(agent, model, recording)

    def kind(name: str) -> str:
        return "gradient" if name == "dist/straightthrough_grad" else "forward"

    recording.compare(ours, kind, at_least=40)


def sequence(
    agent: Agent, model: DreamerV3, recording: Recording, batch: dict
) -> dict[str, Tensor]:
    """Encode the batch and filter it, one step and all steps."""
    dtype, rssm = recording.dtype, model.rssm
    obs = agent.observation(below(batch, "obs"), dtype)
    tokens = model.encoder(obs)
    actions = agent.action(below(batch, "prevact"), dtype)
    first = array(batch["obs/is_first"])
    start = tensor(batch["carry/deter"], dtype), agent.flat(batch["carry/stoch"], dtype)
    ours = {"enc/tokens": tokens}
    if model.encoder.vectors:
        ours["enc/vecinput"] = model.encoder.vector_input(obs, lead=2)
    for name, n in (("observe1", 1), ("observe", first.shape[1])):
        deter, stoch, logit = rssm.observe(*start, tokens[:, :n], actions[:, :n], first[:, :n])
        result = {"deter": deter, "stoch": agent.grouped(stoch), "logit": logit}
        ours |= {f"{name}/{k}": v[:, 0] if n == 1 else v for k, v in result.items()}
    return ours


def steps(agent: Agent, model: DreamerV3, recording: Recording) -> dict[str, Tensor]:
    """One step of the core, the prior, and a rollout with given actions."""
    dtype, rssm = recording.dtype, model.rssm
    core, rollout = recording.group("in/core"), recording.group("in/rollout")
    action = agent.action(below(core, "action"), dtype)
    deter, stoch = tensor(core["deter"], dtype), agent.flat(core["stoch"], dtype)
    ours = {
        "core/actemb": action,  # the vector before the first layer
        "core/deter": rssm.core(deter, stoch, rssm.embed_action(action), rssm.kernels()),
        "prior/logit": rssm.predict_prior(tensor(recording.arrays["in/feat/deter"], dtype)),
    }
    deter, stoch = tensor(rollout["deter"], dtype), agent.flat(rollout["stoch"], dtype)
    states = []
    for action in agent.action(below(rollout, "action"), dtype).unbind(1):
        deter, stoch, logit = rssm.imagine_step(deter, stoch, action)
        states.append((deter, agent.grouped(stoch), logit))
    for name, values in zip(("deter", "stoch", "logit"), zip(*states, strict=True), strict=True):
        ours[f"rollout/{name}"] = torch.stack(values, 1)
    return ours


def distribution(model: DreamerV3, recording: Recording) -> dict[str, Tensor]:
    """The mixed categorical of the latents, its KL and its straight-through gradient."""
    p, q = (tensor(recording.arrays[f"in/dist/logit_{k}"], recording.dtype) for k in "pq")
    p.requires_grad_()
    probs = unimix_probs(p, model.unimix)
    sample = sample_straight_through(probs)
    (grad,) = torch.autograd.grad((sample * q).sum(), p)
    single = [x.flatten(0, 1).unsqueeze(1) for x in (p, q)]
    return {
        "dist/logprobs_p": unimix_log_probs(p, model.unimix),
        "dist/entropy_p": class_entropy(p, model.unimix),
        "dist/kl_pq": kl_divergence(p, q, model.unimix)[0],
        "dist/kl_pq_groups": kl_divergence(*single, model.unimix)[1].view(p.shape[:2]),
        "dist/sample_mode_p": sample,
        "dist/straightthrough_grad": grad,
    }


def heads(agent: Agent, model: DreamerV3, recording: Recording) -> dict[str, Tensor]:
    """Reward, value, continuation and policy on given features and targets."""
    dtype = recording.dtype
    deter = tensor(recording.arrays["in/feat/deter"], dtype)
    features = torch.cat([deter, agent.flat(recording.arrays["in/feat/stoch"], dtype)], -1)
    target = {k: tensor(v, dtype) for k, v in recording.group("in/target").items()}
    ours = {"feat2tensor": features, "slowval/pred": twohot_mean(model.slow_critic(features))}
    twohot: dict[str, tuple[Head, Tensor]] = {
        "rew": (model.reward, target["reward"]),
        "val": (model.critic, target["value"]),
    }
    for name, (head, goal) in twohot.items():
        logits = head(features)
        ours |= {
            f"{name}/logits": logits,
            f"{name}/pred": twohot_mean(logits),
            f"{name}/loss": twohot_loss(logits, goal),
            f"{name}/bins": symexp_bins(logits.shape[-1], dtype, logits.device),
        }
    logit = model.cont(features).squeeze(-1)
    ours |= {"con/logit": logit, "con/prob": torch.sigmoid(logit)}
    ours |= {"con/loss": binary_cross_entropy(logit, target["cont"])}
    policy = model.actor(features)
    action = agent.action(recording.group("in/act"), dtype)
    for key, event in policy.spaces.split(action):
        dist = policy.dists[key]
        if isinstance(dist, Classes):
            ours[f"pol/{key}/logits"] = dist.logits
        else:
            shape = (*features.shape[:-1], *agent.act_space[key]["shape"])
            ours[f"pol/{key}/mean"] = dist.mean.reshape(shape)
            ours[f"pol/{key}/stddev"] = dist.stddev.reshape(shape)
        ours |= {f"pol/{key}/logp": dist.log_prob(event), f"pol/{key}/entropy": dist.entropy()}
    return ours


def decoder(agent: Agent, model: DreamerV3, recording: Recording, batch: dict) -> dict[str, Tensor]:
    """Reconstructions from given features, and their losses against the batch."""
    dtype = recording.dtype
    feat = recording.group("in/feat")
    outs = model.decoder(tensor(feat["deter"], dtype), agent.flat(feat["stoch"], dtype))
    obs = agent.observation(below(batch, "obs"), dtype)
    ours = {}
    for key, out in outs.items():
        ours[f"dec/{key}/loss"] = model.decoder.loss(key, out, obs[key])
        space = model.obs_spaces[key]
        if space.classes:
            ours |= {f"dec/{key}/logits": out, f"dec/{key}/pred": out.argmax(-1)}
        elif space.is_image:
            ours[f"dec/{key}/pred"] = out[:, :2].movedim(-3, -1)
        else:
            ours[f"dec/{key}/pred"] = out
    return ours


def acting(agent: Agent, model: DreamerV3, recording: Recording) -> dict[str, Tensor]:
    """Successive calls of the policy through the public protocol, resetting rows by is_first."""
    inputs = recording.group("in/policy/obs")
    ours: dict[str, Tensor] = {}
    state: LatentState | None = None
    action = torch.zeros(())
    for n, first in enumerate(array(inputs["is_first"])):
        arrays = {key: value[n] for key, value in inputs.items()}
        obs = agent.observation(arrays, recording.dtype)
        fresh = model.encode(obs)
        # The carry starts as zeros, which is what a reset gives.
        known = fresh if state is None else model.observe(state, action, obs)
        state = LatentState.where(first, fresh, known)
        action = model.policy(state)
        assert state.stochastic is not None
        ours[f"policy/{n}/deter"] = state.deterministic
        ours[f"policy/{n}/stoch"] = agent.grouped(state.stochastic)
        ours |= {f"policy/{n}/act/{k}": v for k, v in agent.split_action(action).items()}
    return ours
