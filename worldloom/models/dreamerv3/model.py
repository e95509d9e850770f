"""DreamerV3: a recurrent world model and an actor-critic that learns in its imagination.

Follows the current official code (danijar/dreamerv3, commit e3f0224) number for number; see
tests/reference. Paper: Hafner et al., "Mastering diverse control tasks through world models",
Nature 2025; equation numbers are those of arXiv:2301.04104v2. Axes: B batch rows, T time steps,
D deter, S stoch, C classes, F = D + S * C features, A actions, K starting states of imagination per
row, H imagined steps.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from worldloom.memory import require_memory
from worldloom.models.dreamerv3.behavior import (
    Imagined,
    Normalizers,
    imagination_losses,
    replay_value_loss,
    rollout,
)
from worldloom.models.dreamerv3.heads import Actor, Head, Policy
from worldloom.models.dreamerv3.latents import join_state, split_state
from worldloom.models.dreamerv3.losses import name_losses
from worldloom.models.dreamerv3.networks import Encoder, build_decoder
from worldloom.models.dreamerv3.representation import Posterior
from worldloom.models.dreamerv3.representations import build_representation, represent
from worldloom.models.dreamerv3.rssm import RSSM, RSSM_OPTIONS
from worldloom.models.dreamerv3.sequences import Sequences, align_batch
from worldloom.models.extra_losses import ExtraLosses
from worldloom.models.spaces import ActSpaces, ObsSpaces, check_rows, require_keys
from worldloom.nn.distributions import binary_cross_entropy, class_entropy, kl_divergence
from worldloom.nn.normalizer import Normalizer
from worldloom.nn.twohot import twohot_loss, twohot_mean
from worldloom.protocol import Batch, LatentState, Obs, ReplayField, Trajectory
from worldloom.saving import SavableModel
from worldloom.timing import phase

# On a CPU, heads without gradient process this number of states at a time, to stay in the cache.
HEAD_ROWS_ON_CPU = 1024


class DreamerV3(ExtraLosses, SavableModel):
    """World model, actor and critic in one module.

    Args:
        obs_shape: shape of one observation, or a dict of shapes. Three axes (channels, height,
            width) are an image, fewer axes a vector.
        action_dim: number of continuous actions or of discrete choices; a sequence of numbers of
            choices (multi-discrete); or a dict of named actions, sorted by name in action vectors.
        discrete: whether actions are choices (one-hot); a dict for named actions.
        obs_classes: number of classes of each integer-coded observation.

    Other arguments are hyperparameters; conf/model/dreamerv3_base.yaml explains them.

    feature_dim: width F of `state.features`, for layers of subclasses.

    Raises:
        ValueError: an observation shape or a number of actions is not supported.
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
        decoder: Mapping[str, Any] | bool,
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
        representation: str | Mapping[str, Any] = "decoder",
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.obs_shape, self.action_dim, self.discrete = obs_shape, action_dim, discrete
        self.obs_spaces = ObsSpaces(obs_shape, obs_classes)
        self.act_spaces = ActSpaces(action_dim, discrete)
        self.scales = {k: float(v) for k, v in loss_scales.items()}
        self.unimix, self.free_nats, self.reward_grad = unimix, free_nats, reward_grad
        self.actor_critic, self.replay_context = actor_critic, replay_context
        self.imag_length, self.imag_last, self.ac_grads = imag_length, imag_last, ac_grads
        self.horizon, self.contdisc, self.imag_loss = horizon, contdisc, dict(imag_loss)
        self.repval_loss, self.repval_grad, self.repl_loss = repval_loss, repval_grad, repl_loss
        self._build_networks(options)

    def _build_networks(self, options: Mapping[str, Any]) -> None:
        stoch = options["stoch"] * options["classes"]
        self.feature_dim = features = options["deter"] + stoch
        require_memory(4 * self.imag_length * features, f"imag_length={self.imag_length}")
        units = {"units": options["units"]}
        encoder = {**units, "depth": options["depth"], **options["encoder"]}
        self.encoder = Encoder(self.obs_spaces, **encoder)
        core = {name: options[name] for name in RSSM_OPTIONS}
        self.rssm = RSSM(self.act_spaces.width, self.encoder.width, **core)
        self.representation = build_representation(self, options["representation"])
        probe = self.representation is not None
        self.decoder = build_decoder(self.obs_spaces, stoch, probe, options)
        self.reward = Head(features, **units | dict(options["reward_head"]))
        self.cont = Head(features, **units | dict(options["continue_head"]))
        if not self.actor_critic:
            self.policy = self.value = None  # type: ignore[assignment, method-assign]
            return
        self.actor = Actor(features, self.act_spaces, **units | dict(options["actor"]))
        self.critic = Head(features, **units | dict(options["critic"]))
        self.slow = dict(options["slow_critic"])
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("slow_count", torch.zeros((), dtype=torch.int64))
        self.retnorm = Normalizer(**options["retnorm"])
        self.valnorm = Normalizer(**options["valnorm"])
        self.advnorm = Normalizer(**options["advnorm"])

    # Acting and imagining -------------------------------------------------------------------

    def encode(self, obs: Obs) -> LatentState:
        """Start an episode: return the posterior for obs [B, *obs_shape] after a zero state."""
        tokens = self.encoder(self.obs_spaces.split(obs, lead=1))
        deter, stoch = self.rssm.initial(len(tokens))
        action = tokens.new_zeros(len(tokens), self.act_spaces.width)
        deter, stoch, _ = self.rssm.observe_step(deter, stoch, action, tokens)
        return join_state(deter, stoch)

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Sample the next state from the prior for action [B, A]."""
        self.act_spaces.check(action, ("B",))
        deter, stoch = split_state(state)
        deter, stoch, _ = self.rssm.imagine_step(deter, stoch, action.to(deter.dtype))
        return join_state(deter, stoch)

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Sample the next state from the posterior for action [B, A] and obs [B, *obs_shape]."""
        self.act_spaces.check(action, ("B",))
        tokens = self.encoder(self.obs_spaces.split(obs, lead=1))
        deter, stoch = split_state(state)
        deter, stoch, _ = self.rssm.observe_step(deter, stoch, action.to(deter.dtype), tokens)
        return join_state(deter, stoch)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Predict observation, reward and continuation.

        "obs" is [B, *obs_shape] in units of the observation (images as float32 from 0 to 255); it
        is missing in a model without a decoder.
        "reward" [B, 1] is the reward for arriving at the state. "continue" [B, 1] is the
        probability that the episode continues, without the discount that `contdisc` adds.
        """
        outcome = self._predict_outcome(state.features)
        if self.decoder is None:
            return outcome
        outs = self.decoder(*split_state(state))
        obs = {key: self.decoder.observation(key, out) for key, out in outs.items()}
        return {"obs": self.obs_spaces.join(obs), **outcome}

    def imagine(self, initial_state: LatentState, actions: Tensor) -> Trajectory:
        """Roll out actions [T, B, A]; the heads process all steps at once."""
        self.act_spaces.check(actions, ("T", "B"))
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        outcome = self._predict_outcome(torch.stack([state.features for state in states[1:]]))
        return Trajectory(states, outcome["reward"], outcome["continue"])

    def policy(self, state: LatentState, deterministic: bool = False) -> Tensor:
        """Return sampled actions [B, A], or the mode; continuous samples may exceed [-1, 1]."""
        return self.actor(state.features).sample(deterministic)

    def value(self, state: LatentState) -> Tensor:
        """Return the critic's discounted return after a state, [B, 1]."""
        offset, scale = self.valnorm.stats()
        return (twohot_mean(self.critic(state.features)) * scale + offset).unsqueeze(-1)

    def discount(self, state: LatentState) -> float:
        """Return the discount of `value`."""
        return 1 - 1 / self.horizon

    def latent_probs(self, state: LatentState, action: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:
        """Return the probabilities [B, S, C] of prior and posterior after action and obs."""
        tokens = self.encoder(self.obs_spaces.split(obs, lead=1))
        deter, stoch = split_state(state)
        return self.rssm.compare(deter, stoch, action.to(deter.dtype), tokens)

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
        deter, stoch = split_state(state)
        return {"deter": deter, "stoch": stoch}

    # Training -------------------------------------------------------------------------------

    def compute_loss(self, batch: Batch) -> dict[str, Any]:
        """Return "loss" and every loss term and statistic by name, all scalars.

        "kl_loss" and "reconstruction_loss" are the weighted sums of "dyn_loss", "rep_loss" and
        "reconstruction_loss/KEY"; these parts and "reward_loss", "continue_loss", "policy_loss",
        "value_loss" and "replay_value_loss" are unweighted means. In training mode the running
        return scale is updated, as in the official code. If the batch has "context" (latents of
        row 0), rows 1 to T - 1 are trained on and their new latents are returned under "replay";
        otherwise all rows are trained on, starting from a zero state.

        Extra terms, from `auxiliary_losses` or from an overridden `world_model_terms` or
        `behavior_terms`, are weighted by `loss_scales[NAME]` (default 1) and returned as
        "NAME_loss".
        """
        sequences = self.prepare_batch(batch)
        with phase("world_model"):
            terms, stats, deter, stoch = self.world_model_terms(sequences)
        if self.actor_critic:
            with phase("heads"):
                more, more_stats = self.behavior_terms(sequences, deter, stoch)
            terms |= more
            stats |= more_stats
        if self.has_auxiliary_losses:
            with phase("auxiliary"):
                terms |= self.compute_auxiliary(batch, torch.cat([deter, stoch], -1), terms)
        result: dict[str, Any] = name_losses(terms, self.scales, self.obs_spaces.single) | stats
        if self.replay_context and "context" in batch:
            result["replay"] = {"deter": deter.detach(), "stoch": stoch.detach()}
        return result

    def after_update(self) -> None:
        """Move the slow critic towards the critic; to be called after each optimiser step."""
        if self.representation is not None:
            self.representation.after_update(self)
        if not self.actor_critic:
            return
        count: Tensor = self.slow_count  # type: ignore[assignment]
        slow: list[Tensor] = list(self.slow_critic.parameters())
        fast: list[Tensor] = list(self.critic.parameters())
        rate, every = self.slow["rate"], self.slow["every"]
        if every > 1:  # the count stays on its device
            rate = [(count % every == 0).to(slow[0].dtype) * rate] * len(slow)
        with torch.no_grad():
            torch._foreach_lerp_(slow, fast, rate)
        count += 1

    # Loss terms before the mean over rows and steps -------------------------------------------

    def prepare_batch(self, batch: Batch) -> Sequences:
        """Validate a batch, and align each row with the action that led to it.

        Raises:
            ValueError: a key is missing, a shape is wrong, or there are fewer than 2 rows.
        """
        require_keys(batch)
        obs = self.obs_spaces.split(batch["obs"], lead=2)
        rows, steps = check_rows(batch, obs, self.act_spaces)
        if steps < 2:
            raise ValueError(f"sequences have {steps} rows; a loss over time needs at least 2")
        deter, stoch = self.rssm.initial(rows)
        context = batch.get("context") if self.replay_context else None
        if context:
            deter, stoch = (context[k].flatten(1).to(deter.dtype) for k in ("deter", "stoch"))
        return align_batch(batch, obs, deter, stoch, bool(context))

    def world_model_terms(
        self, seq: Sequences
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        """Return loss terms [B, T], statistics, deter [B, T, D] and stoch [B, T, S * C].

        The terms are those of the world model's loss (eqs. 2-3).
        """
        # Latent states and KL terms, both clipped below at `free_nats`.
        tokens = self.encoder(seq.obs)  # [B, T, E]
        deter, stoch, posterior = self.rssm.observe(
            seq.deter, seq.stoch, tokens, seq.prev_actions, seq.is_first
        )
        prior = self.rssm.predict_prior(deter)  # logits [B, T, S, C]
        dyn, rep = kl_divergence(posterior, prior, self.unimix)
        terms = {"dyn": dyn.clamp(min=self.free_nats), "rep": rep.clamp(min=self.free_nats)}

        # Reward and continuation.
        features = torch.cat([deter, stoch], -1)  # [B, T, F]
        reward_input = features if self.reward_grad else features.detach()
        terms["rew"] = twohot_loss(self.reward(reward_input), seq.rewards)
        cont = (~seq.is_terminal).to(features.dtype)
        if self.contdisc:
            cont = cont * (1 - 1 / self.horizon)
        terms["con"] = binary_cross_entropy(self.cont(features).squeeze(-1), cont)

        terms |= represent(self, Posterior(seq, tokens, features), deter, stoch)
        with torch.no_grad():
            stats = {
                "dyn_ent": class_entropy(prior, self.unimix).mean(),
                "rep_ent": class_entropy(posterior, self.unimix).mean(),
            }
        return terms, stats, deter, stoch

    def behavior_terms(
        self, seq: Sequences, deter: Tensor, stoch: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the loss terms policy and value [B, K], repval [B, K - 1], and statistics."""
        # Imagination starts from the last `imag_last` states of each row, or from all (0).
        rows, steps = deter.shape[:2]
        starts = min(self.imag_last or steps, steps)
        features = torch.cat([deter[:, -starts:], stoch[:, -starts:]], -1)  # [B, K, F]

        # Losses on imagined trajectories, [B * K, H], averaged over the imagined steps.
        start = features.flatten(0, 1)
        with phase("imagine"):
            states = rollout(
                self.rssm, self.actor, start if self.ac_grads else start.detach(), self.imag_length
            )
        imagined = self.evaluate(*states)
        norms = Normalizers(self.retnorm, self.valnorm, self.advnorm)
        options: dict[str, Any] = {"update": self.training, "horizon": self.horizon}
        losses, returns, stats = imagination_losses(
            imagined, norms, contdisc=self.contdisc, **options, **self.imag_loss
        )
        terms = {k: v.mean(1).unflatten(0, (rows, starts)) for k, v in losses.items()}

        # Critic loss on the replayed steps; a lambda-return needs at least one further step.
        if self.repval_loss and starts > 1:
            features = features if self.repval_grad else features.detach()
            with torch.no_grad():
                slow_value = twohot_mean(self.slow_critic(features))
            terms["repval"], _ = replay_value_loss(
                self.critic(features),
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

    def evaluate(self, features: Tensor, actions: Tensor, policy: Policy) -> Imagined:
        """Apply the heads to the result of `rollout`, with features [N, H + 1, F]."""
        with torch.no_grad():
            on_cpu = features.device.type == "cpu"
            rows = HEAD_ROWS_ON_CPU // features.shape[1] if on_cpu else len(features)
            chunks = features.split(max(1, rows))
            reward, cont, slow_value = torch.cat([self._predict_scalars(x) for x in chunks], 1)
        return Imagined(actions, policy, reward, cont, self.critic(features), slow_value)

    def _predict_scalars(self, features: Tensor) -> Tensor:
        """Return reward, continuation and slow value [3, ...] for features [..., F]."""
        reward, slow_value = (twohot_mean(f(features)) for f in (self.reward, self.slow_critic))
        return torch.stack([reward, torch.sigmoid(self.cont(features).squeeze(-1)), slow_value])

    def _predict_outcome(self, features: Tensor) -> dict[str, Tensor]:
        cont = torch.sigmoid(self.cont(features))
        if self.contdisc:
            cont = (cont / (1 - 1 / self.horizon)).clamp(max=1.0)
        return {"reward": twohot_mean(self.reward(features)).unsqueeze(-1), "continue": cont}
