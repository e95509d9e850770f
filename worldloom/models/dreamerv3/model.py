"""DreamerV3: a recurrent world model and an actor-critic that learns inside it.

Follows the current official code (danijar/dreamerv3, commit e3f0224) number for number; see
tests/reference. Paper: Hafner et al., "Mastering diverse control tasks through world models",
Nature 2025 (arXiv:2301.04104). Axes: B rows, T steps, K = starts of imagination per row,
H = imagined steps, N = B * K.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.models.dreamerv3.behavior import (
    Imagined,
    Normalizers,
    imagination_losses,
    replay_value_loss,
    rollout,
)
from worldloom.models.dreamerv3.networks import Actor, Decoder, Encoder, Head, Policy
from worldloom.models.dreamerv3.rssm import RSSM
from worldloom.models.spaces import ActSpaces, ObsSpaces, check_rows, require_keys
from worldloom.nn.distributions import binary_cross_entropy, class_entropy, kl_divergence
from worldloom.nn.normalizer import Normalizer
from worldloom.nn.twohot import twohot_loss, twohot_mean
from worldloom.protocol import Batch, LatentState, Obs, ReplayField, Trajectory
from worldloom.timing import phase

# Imagined states that the heads which do not learn look at together on a CPU.
CPU_ROWS = 1024


@dataclass
class Sequences:
    """A batch as the model reads it: `prev_actions[:, t]` led to row t."""

    obs: dict[str, Tensor]
    prev_actions: Tensor
    rewards: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    deter: Tensor
    stoch: Tensor


class DreamerV3(nn.Module):
    """World model, actor and critic in one module; see `conf/model/dreamerv3_base.yaml`.

    Args:
        obs_shape: shape of one observation, or a dict of shapes; three axes (channels, height,
            width) make an image, fewer a vector.
        action_dim: number of continuous actions or of discrete choices; a sequence of numbers of
            choices (multi-discrete); or a dict of named actions, in the vector sorted by name.
        discrete: whether actions are choices (one-hot); a dict for named actions.
        obs_classes: number of classes of each integer-coded observation.
        Everything else is a hyperparameter; its meaning and its value stand in the YAML.

    Raises:
        ValueError: a shape that no encoder takes, or an impossible number of actions.
    """

    takes = ("vectors, images, dicts of both", "continuous, discrete, multi-discrete")

    def __init__(
        self,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
        action_dim: int | Sequence[int] | Mapping[str, int],
        discrete: bool | Mapping[str, bool] = False,
        obs_classes: Mapping[str, int] | None = None,
        *,
        units: int,
        depth: int,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        blocks: int,
        dyn_layers: int,
        img_layers: int,
        obs_layers: int,
        absolute: bool,
        unimix: float,
        free_nats: float,
        encoder: Mapping[str, Any],
        decoder: Mapping[str, Any],
        reward_head: Mapping[str, Any],
        continue_head: Mapping[str, Any],
        actor: Mapping[str, Any],
        critic: Mapping[str, Any],
        slow_critic: Mapping[str, Any],
        loss_scales: Mapping[str, float],
        actor_critic: bool,
        imag_length: int,
        imag_last: int,
        horizon: float,
        contdisc: bool,
        imag_loss: Mapping[str, Any],
        repl_loss: Mapping[str, Any],
        retnorm: Mapping[str, Any],
        valnorm: Mapping[str, Any],
        advnorm: Mapping[str, Any],
        reward_grad: bool,
        repval_loss: bool,
        repval_grad: bool,
        ac_grads: bool,
        replay_context: bool,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = {"model": "dreamerv3", **copy.deepcopy(arguments)}
        self.obs_shape, self.action_dim, self.discrete = obs_shape, action_dim, discrete
        self.obs_spaces = ObsSpaces(obs_shape, obs_classes)
        self.act_spaces = ActSpaces(action_dim, discrete)
        self.scales = {k: float(v) for k, v in loss_scales.items()}
        self.unimix, self.free_nats = unimix, free_nats
        self.imag_length, self.imag_last = imag_length, imag_last
        self.horizon, self.contdisc = horizon, contdisc
        self.imag_loss, self.repl_loss = dict(imag_loss), dict(repl_loss)
        self.reward_grad, self.ac_grads = reward_grad, ac_grads
        self.repval_loss, self.repval_grad = repval_loss, repval_grad
        self.slow = dict(slow_critic)

        width = stoch * classes
        features = deter + width
        images = {"units": units, "depth": depth}
        self.encoder = Encoder(self.obs_spaces, **(images | dict(encoder)))
        self.rssm = RSSM(
            self.act_spaces.width,
            self.encoder.width,
            deter=deter,
            hidden=hidden,
            stoch=stoch,
            classes=classes,
            blocks=blocks,
            dyn_layers=dyn_layers,
            img_layers=img_layers,
            obs_layers=obs_layers,
            unimix=unimix,
            absolute=absolute,
        )
        self.decoder = Decoder(self.obs_spaces, deter, width, **(images | dict(decoder)))
        head = {"units": units}
        self.reward = Head(features, **_twohot_head(head | dict(reward_head)))
        self.cont = Head(features, outputs=1, **(head | dict(continue_head)))
        if actor_critic:
            self.actor = Actor(features, self.act_spaces, **(head | dict(actor)))
            self.critic = Head(features, **_twohot_head(head | dict(critic)))
            self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
            self.register_buffer("slow_count", torch.zeros((), dtype=torch.int64))
            self.retnorm = Normalizer(**retnorm)
            self.valnorm = Normalizer(**valnorm)
            self.advnorm = Normalizer(**advnorm)
        else:
            self.policy = None  # type: ignore[assignment, method-assign]
        self.actor_critic = actor_critic
        self.replay_context = replay_context

    # Acting and imagining -------------------------------------------------------------------

    def encode(self, obs: Obs) -> LatentState:
        """Start an episode: the posterior after obs [B, *obs_shape] from a zero state."""
        tokens = self.encoder(self.obs_spaces.split(obs, lead=1))
        deter, stoch = self.rssm.initial(len(tokens))
        action = tokens.new_zeros(len(tokens), self.act_spaces.width)
        deter, stoch, _ = self.rssm.observe_step(deter, stoch, action, tokens)
        return self._state(deter, stoch)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Sample the prior of the next state for action [B, A]."""
        self.act_spaces.check(action, ("B",))
        deter, stoch = _latent(state)
        deter, stoch, _ = self.rssm.imagine_step(deter, stoch, action.to(deter.dtype))
        return self._state(deter, stoch)

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Sample the posterior of the next state for action [B, A] and obs [B, *obs_shape]."""
        self.act_spaces.check(action, ("B",))
        tokens = self.encoder(self.obs_spaces.split(obs, lead=1))
        deter, stoch = _latent(state)
        deter, stoch, _ = self.rssm.observe_step(deter, stoch, action.to(deter.dtype), tokens)
        return self._state(deter, stoch)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Predict "obs" [B, *obs_shape] in its own units (images as float32 from 0 to 255).

        Also "reward" [B, 1] for arriving at the state, and "continue" [B, 1], the probability
        that the episode goes on (without the discount that training folds into it).
        """
        outs = self.decoder(*_latent(state))
        obs = {key: self.decoder.observation(key, out) for key, out in outs.items()}
        return {"obs": self.obs_spaces.join(obs), **self._outcome(state.features)}

    def imagine(self, initial_state: LatentState, actions: Tensor) -> Trajectory:
        """Roll out actions [T, B, A]; heads run once over all steps."""
        self.act_spaces.check(actions, ("T", "B"))
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        outcome = self._outcome(torch.stack([state.features for state in states[1:]]))
        return Trajectory(states, outcome["reward"], outcome["continue"])

    def policy(self, state: LatentState, deterministic: bool = False) -> Tensor:
        """Choose actions [B, A]: sampled, or the policy's mode; clip continuous ones to [-1, 1]."""
        return self.actor(state.features).sample(deterministic)

    @property
    def replay_fields(self) -> dict[str, ReplayField]:
        """Latents that the replay stores with every row; none without `replay_context`.

        Half precision is finer than the bfloat16 in which the official code stores them.
        """
        if not self.replay_context:
            return {}
        width = self.rssm.stoch * self.rssm.classes
        return {
            "deter": ReplayField((self.rssm.deter,), torch.float16),
            "stoch": ReplayField((width,), torch.uint8),
        }

    def replay_values(self, state: LatentState) -> dict[str, Tensor]:
        """Return the values of `replay_fields` for a state, each [B, ...]."""
        deter, stoch = _latent(state)
        return {"deter": deter, "stoch": stoch}

    # Training -------------------------------------------------------------------------------

    def compute_loss(self, batch: Batch) -> dict[str, Any]:
        """Return "loss" and every term and statistic by name, all scalars.

        "kl_loss" and "reconstruction_loss" are the weighted sums of their parts "dyn_loss",
        "rep_loss" and "reconstruction_loss/KEY"; "reward_loss", "continue_loss", "policy_loss",
        "value_loss" and "replay_value_loss" are unweighted means. In training mode it moves the
        running return scale, as the official code does. If the batch has "context" (latents of
        row 0), rows 1 to T - 1 are trained on and their new latents are returned under "replay";
        otherwise all rows are trained on, starting from a zero state.
        """
        sequences = self.sequences(batch)
        with phase("world_model"):
            terms, stats, deter, stoch = self.world_model_terms(sequences)
        if self.actor_critic:
            with phase("heads"):
                more, more_stats = self.behavior_terms(sequences, deter, stoch)
            terms |= more
            stats |= more_stats
        result: dict[str, Any] = self._named_losses(terms) | stats
        if self.replay_context and "context" in batch:
            result["replay"] = {"deter": deter.detach(), "stoch": stoch.detach()}
        return result

    def after_update(self) -> None:
        """Move the slow critic towards the critic; call it after each optimiser step."""
        if not self.actor_critic:
            return
        count: Tensor = self.slow_count  # type: ignore[assignment]
        if self.slow["every"] == 1 or int(count) % self.slow["every"] == 0:
            with torch.no_grad():
                slow: list[Tensor] = list(self.slow_critic.parameters())
                fast: list[Tensor] = list(self.critic.parameters())
                torch._foreach_lerp_(slow, fast, self.slow["rate"])
        count += 1

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.yaml; `create_world_model(folder)` reads them."""
        from worldloom.saving import save_model

        save_model(self, folder)

    # The terms of the loss, each [B, T] or so, before any mean ----------------------------------

    def sequences(self, batch: Batch) -> Sequences:
        """Check a batch and align each row with the action that led to it."""
        require_keys(batch)
        dtype = self.rssm.gru.bias.dtype
        obs = self.obs_spaces.split(batch["obs"], lead=2)
        steps = check_rows(batch, obs, self.act_spaces)[1]
        if steps < 2:
            raise ValueError(f"sequences have {steps} rows; a loss over time needs at least 2")
        actions = batch["actions"].to(dtype)
        rows = {k: batch[k] for k in ("rewards", "is_first", "is_last", "is_terminal")}
        if self.replay_context and (context := batch.get("context")):
            deter, stoch = (context[k].flatten(1).to(dtype) for k in ("deter", "stoch"))
            obs = {k: v[:, 1:] for k, v in obs.items()}
            rows = {k: v[:, 1:] for k, v in rows.items()}
            prev_actions = actions[:, :-1]
        else:
            deter, stoch = self.rssm.initial(len(actions))
            prev_actions = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
            first = rows["is_first"].clone()
            first[:, 0] = True
            rows["is_first"] = first
        return Sequences(obs, prev_actions, deter=deter, stoch=stoch, **rows)

    def world_model_terms(
        self, seq: Sequences
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        """Return the world model's losses [B, T] (paper eqs. 2-5), statistics, deter and stoch."""
        tokens = self.encoder(seq.obs)
        deter, stoch, post = self.rssm.observe(
            seq.deter, seq.stoch, tokens, seq.prev_actions, seq.is_first
        )
        prior = self.rssm.prior_of(deter)
        dyn, rep = kl_divergence(post, prior, self.unimix)
        terms = {"dyn": dyn.clamp(min=self.free_nats), "rep": rep.clamp(min=self.free_nats)}
        features = torch.cat([deter, stoch], -1)
        reward_input = features if self.reward_grad else features.detach()
        terms["rew"] = twohot_loss(self.reward(reward_input), seq.rewards)
        cont = (~seq.is_terminal).to(features.dtype)
        if self.contdisc:
            cont = cont * (1 - 1 / self.horizon)
        terms["con"] = binary_cross_entropy(self.cont(features).squeeze(-1), cont)
        for key, out in self.decoder(deter, stoch).items():
            terms[f"rec/{key}"] = self.decoder.loss(key, out, seq.obs[key])
        with torch.no_grad():
            stats = {
                "dyn_ent": class_entropy(prior, self.unimix).mean(),
                "rep_ent": class_entropy(post, self.unimix).mean(),
            }
        return terms, stats, deter, stoch

    def behavior_terms(
        self, seq: Sequences, deter: Tensor, stoch: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the losses of actor and critic: policy, value [B, K], repval [B, K - 1]."""
        rows, steps = deter.shape[:2]
        starts = min(self.imag_last or steps, steps)
        deter, stoch = deter[:, -starts:], stoch[:, -starts:]
        start = torch.cat([deter, stoch], -1).flatten(0, 1)
        start = start if self.ac_grads else start.detach()
        with phase("imagine"):
            states = rollout(self.rssm, self.actor, start, self.imag_length)
        imagined = self.evaluate(*states)
        norms = Normalizers(self.retnorm, self.valnorm, self.advnorm)
        options: dict[str, Any] = {"update": self.training, "horizon": self.horizon}
        losses, returns, stats = imagination_losses(
            imagined, norms, contdisc=self.contdisc, **options, **self.imag_loss
        )
        terms = {k: v.mean(1).unflatten(0, (rows, starts)) for k, v in losses.items()}
        if self.repval_loss and starts > 1:  # a return needs a step to come
            feat = torch.cat([deter, stoch], -1)
            feat = feat if self.repval_grad else feat.detach()
            with torch.no_grad():
                slow_value = twohot_mean(self.slow_critic(feat))
            terms["repval"], _ = replay_value_loss(
                self.critic(feat),
                slow_value,
                returns[:, 0].unflatten(0, (rows, starts)),
                seq.rewards[:, -starts:],
                seq.is_last[:, -starts:],
                seq.is_terminal[:, -starts:],
                self.valnorm,
                **options,
                **self.repl_loss,
            )
        return terms, {k: v.detach() for k, v in stats.items()}

    def imagine_policy(self, deter: Tensor, stoch: Tensor) -> tuple[Tensor, Tensor]:
        """Let the policy act in imagination from deter [N, D] and stoch [N, S * C].

        Returns features [N, H + 1, F] and actions [N, H, A], without gradient.
        """
        start = torch.cat([deter, stoch], -1)
        with torch.no_grad():
            return rollout(self.rssm, self.actor, start, self.imag_length)[:2]

    def evaluate(self, features: Tensor, actions: Tensor, policy: Policy | None = None) -> Imagined:
        """Run the heads over imagined features [N, H + 1, F]; the policy too if none is given."""
        with torch.no_grad():
            # In pieces on a CPU: what a head makes of one fits its cache.
            at_once = CPU_ROWS if features.device.type == "cpu" else features[..., 0].numel()
            pieces = features.split(max(1, at_once // features.shape[1]))
            reward, cont, slow_value = torch.cat([self._judge(piece) for piece in pieces], 1)
        policy = self.actor(features[:, :-1]) if policy is None else policy
        return Imagined(actions, policy, reward, cont, self.critic(features), slow_value)

    def _judge(self, features: Tensor) -> Tensor:
        """Return reward, continuation and slow value [3, ...] of features [..., F]."""
        reward, slow_value = (twohot_mean(f(features)) for f in (self.reward, self.slow_critic))
        return torch.stack([reward, torch.sigmoid(self.cont(features).squeeze(-1)), slow_value])

    # Small things ---------------------------------------------------------------------------

    def scale_of(self, term: str) -> float:
        """Return the weight of a term in the total."""
        return self.scales["rec" if term.startswith("rec/") else term]

    def _named_losses(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {name: term.mean() for name, term in terms.items()}
        weighted = {name: mean * self.scale_of(name) for name, mean in means.items()}
        recs = [name for name in means if name.startswith("rec/")]
        named = {
            "loss": torch.stack(list(weighted.values())).sum(),
            "kl_loss": (weighted["dyn"] + weighted["rep"]).detach(),
            "reconstruction_loss": torch.stack([weighted[name] for name in recs]).sum().detach(),
        }
        names = {
            "dyn": "dyn_loss",
            "rep": "rep_loss",
            "rew": "reward_loss",
            "con": "continue_loss",
            "policy": "policy_loss",
            "value": "value_loss",
            "repval": "replay_value_loss",
        }
        if not self.obs_spaces.single:
            names |= {name: f"reconstruction_loss/{name.removeprefix('rec/')}" for name in recs}
        return named | {names[k]: v.detach() for k, v in means.items() if k in names}

    def _outcome(self, features: Tensor) -> dict[str, Tensor]:
        cont = torch.sigmoid(self.cont(features))
        if self.contdisc:
            cont = (cont / (1 - 1 / self.horizon)).clamp(max=1.0)
        return {"reward": twohot_mean(self.reward(features)).unsqueeze(-1), "continue": cont}

    @staticmethod
    def _state(deter: Tensor, stoch: Tensor) -> LatentState:
        return LatentState(deter, stoch, torch.cat([deter, stoch], -1))


def _latent(state: LatentState) -> tuple[Tensor, Tensor]:
    if state.stochastic is None:
        raise ValueError("the state has no stochastic part; it comes from another kind of model")
    return state.deterministic, state.stochastic


def _twohot_head(options: dict[str, Any]) -> dict[str, Any]:
    return {"outputs" if k == "bins" else k: v for k, v in options.items()}
