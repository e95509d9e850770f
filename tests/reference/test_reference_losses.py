"""Every loss, its parts, its statistics and its gradients, against loss_mode and loss_noise."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.dreamerv3_format import (
    Agent,
    clone,
    gradients,
    metrics,
    official_params,
    official_state,
    sampling,
)
from tests.reference.reference_format import (
    DTYPES,
    Recording,
    agent_folders,
    array,
    below,
    load,
    norm,
)
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.dreamerv3.behavior import (
    Normalizers,
    imagination_losses,
    replay_value_loss,
    rollout,
)
from worldloom.nn.twohot import twohot_mean
from worldloom.protocol import Batch, split_result


@pytest.mark.parametrize(
    ("file", "precision"),
    [
        ("loss_noise.npz", "float64"),
        ("loss_noise.npz", "float32"),
        ("loss_mode.npz", "float32"),  # not recorded in double
    ],
)
@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_reference_losses(folder: str, file: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, file, precision)
    noise = recording.group("noise")
    model = agent.build(precision).train()
    batch = replay_batch(agent, precision)
    with sampling(noise or None):
        ours = public_losses(agent, clone(model), batch)
        ours |= stepwise_losses(agent, clone(model), batch)
        ours |= term_gradients(agent, clone(model), batch)
    mode = file == "loss_mode.npz"
    recording.compare(ours, _kind, lambda name: mode and _is_zero_gradient(name), at_least=100)


def _kind(name: str) -> str:
    if name == "metrics/ret_rate":
        return "float32 mean"
    return "gradient" if name.startswith(("grad", "termgradnorm")) else "forward"


def _is_zero_gradient(name: str) -> bool:
    """Whether it is the gradient through the mean at an action that equals the mean."""
    return name.startswith(("grad/pol/head/", "gradnorm/pol/head/")) and "/mean/" in name


def replay_batch(agent: Agent, precision: str) -> Batch:
    """Put the recorded carry and previous actions into the form in which the replay gives them.

    One context row comes first; it carries the action that led to the first recorded row.
    """
    dtype = DTYPES[precision]
    arrays = load(agent.folder, "batch.npz")
    obs = below(arrays, "obs")
    action = agent.action(below(arrays, "prevact"), dtype)

    def prepend(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], x], 1)

    flags = {k: prepend(array(obs[k])) for k in ("is_first", "is_last", "is_terminal")}
    return {
        "obs": {k: prepend(v) for k, v in agent.observation(obs, dtype).items()},
        "actions": torch.cat([action, torch.zeros_like(action[:, :1])], 1),
        "rewards": prepend(array(obs["reward"]).to(dtype)),
        **flags,
        "context": {
            "deter": array(arrays["carry/deter"]).to(dtype),
            "stoch": agent.flat(arrays["carry/stoch"], dtype),
        },
    }


def public_losses(agent: Agent, model: DreamerV3, batch: Batch) -> dict[str, Tensor]:
    """What `compute_loss` returns, by recorded name."""
    out, latents = split_result(model.compute_loss(batch))
    out["loss"].backward()
    reported = metrics(agent, out)
    ours = {"losstotal": out["loss"], **{f"metrics/{k}": v for k, v in reported.items()}}
    ours |= {f"lossmean/{name}": value for name, value in below(reported, "loss").items()}
    ours |= {"carry/deter": latents["deter"][:, -1]}
    ours |= {"carry/stoch": agent.grouped(latents["stoch"][:, -1])}
    ours |= {f"state/{k}": v for k, v in official_state(model).items() if "norm/" in k}
    grads = gradients(model)
    ours |= {f"grad/{name}": grad for name, grad in grads.items()}
    ours |= {f"gradnorm/{name}": grad.norm() for name, grad in grads.items()}
    return ours | {"gradnormtotal": norm(grads)}


def stepwise_losses(agent: Agent, model: DreamerV3, batch: Batch) -> dict[str, Tensor]:
    """Every term per step, and all that leads to it."""
    ours: dict[str, Any] = {}
    with torch.no_grad():
        seq = model.prepare_batch(batch)
        tokens = model.encoder(seq.obs)
        deter, stoch, logit = model.rssm.observe(
            seq.deter, seq.stoch, tokens, seq.prev_actions, seq.is_first
        )
        ours |= {"tokens": tokens, "prior/logit": model.rssm.predict_prior(deter)}
        ours |= {"post/deter": deter, "post/stoch": agent.grouped(stoch), "post/logit": logit}

        # Imagination; behavior_terms updates the running scales, so it works on a copy.
        terms, _, deter, stoch = model.world_model_terms(seq)
        terms |= clone(model).behavior_terms(seq, deter, stoch)[0]
        ours |= {f"loss/{agent.key_loss(name)}": term for name, term in terms.items()}

        rows, steps = deter.shape[:2]
        starts = min(model.imag_last or steps, steps)
        deter, stoch = deter[:, -starts:], stoch[:, -starts:]
        start = torch.cat([deter, stoch], -1).flatten(0, 1)
        states = rollout(model.rssm, model.actor, start, model.imag_length)
        imagined, (features, actions, _) = model.evaluate(*states), states
        img_deter, img_stoch = features.split([model.rssm.deter, stoch.shape[-1]], -1)
        ours |= {
            "img/feat/deter": img_deter[:, 1:],
            "img/feat/stoch": agent.grouped(img_stoch[:, 1:]),
            "img/feat/logit": model.rssm.predict_prior(img_deter[:, 1:]),
            "img/rew": imagined.reward,
            "img/con": imagined.cont,
            "img/val": twohot_mean(imagined.value_logits),
            "img/slowval": imagined.slow_value,
        }
        # The official agent also chooses an action at the last state, which no loss uses.
        last = model.actor(features[:, -1]).sample()
        actions = torch.cat([actions, last.unsqueeze(1)], 1)
        policy = model.actor(features)
        ours |= {f"img/action/{k}": v for k, v in agent.split_action(actions).items()}
        for key, event in policy.spaces.split(actions):
            ours[f"img/logp/{key}"] = policy.dists[key].log_prob(event)
            ours[f"img/entropy/{key}"] = policy.dists[key].entropy()

        norms = Normalizers(model.retnorm, model.valnorm, model.advnorm)
        options: Any = {"update": True, "horizon": model.horizon}
        losses, returns, _ = imagination_losses(
            imagined, norms, contdisc=model.contdisc, **options, **model.imag_loss
        )
        ours |= {f"img/loss/{name}": loss for name, loss in losses.items()} | {"img/ret": returns}

        boot = returns[:, 0].unflatten(0, (rows, starts))
        feat = torch.cat([deter, stoch], -1)
        value_logits = model.critic(feat)
        ours |= {"repl/boot": boot, "repl/val": twohot_mean(value_logits)}
        _, ours["repl/ret"] = replay_value_loss(
            value_logits,
            twohot_mean(model.slow_critic(feat)),
            boot,
            seq.rewards[:, -starts:],
            seq.is_last[:, -starts:],
            seq.is_terminal[:, -starts:],
            model.valnorm,
            **options,
            **model.repl_loss,
        )
    return ours


def term_gradients(agent: Agent, model: DreamerV3, batch: Batch) -> dict[str, Tensor]:
    """The norm of the gradient of each unweighted mean loss on each module."""
    seq = model.prepare_batch(batch)
    terms, _, deter, stoch = model.world_model_terms(seq)
    terms |= model.behavior_terms(seq, deter, stoch)[0]
    params = official_params(model)
    ours = {}
    for term, value in terms.items():
        grads = torch.autograd.grad(
            value.mean(), list(params.values()), retain_graph=True, allow_unused=True
        )
        by_name = dict(zip(params, grads, strict=True))
        for module in {name.split("/")[0] for name in params}:
            mine = {
                k: g for k, g in by_name.items() if k.startswith(module + "/") and g is not None
            }
            size = norm(mine) if mine else torch.zeros(())
            ours[f"termgradnorm/{agent.key_loss(term)}/{module}"] = size
    return ours
