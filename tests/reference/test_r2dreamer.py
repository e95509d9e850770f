"""The representation losses of R2-Dreamer: posterior, losses, gradients and updates."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.dreamerv3_format import Agent, sampling
from tests.reference.reference_format import (
    DTYPES,
    ROOT,
    Recording,
    agent_folders,
    load,
    norm,
    prepare,
    tensor,
)
from worldloom import create_world_model
from worldloom.models.dreamerv3 import DreamerV3, dreamerpro
from worldloom.models.dreamerv3.dreamerpro import Prototypes, assign, shift_sequences
from worldloom.models.dreamerv3.official import from_official, official_names, to_official
from worldloom.models.dreamerv3.representation import (
    Posterior,
    barlow_loss,
    infonce_loss,
    standardize,
)
from worldloom.models.dreamerv3.sequences import Sequences
from worldloom.nn.distributions import sample_straight_through, unimix_probs
from worldloom.training.optimizers import LaProp

FAMILY = "r2dreamer"
PRECISIONS = ["float64", "float32"]
LOSSES = ["r2dreamer", "infonce", "dreamerpro"]
NEW = {
    "representation.proj.weight": "proj/kernel",
    "representation.prototypes": "proto/prototypes",
    **{
        f"representation.{ours}.{part}": f"{theirs}/{part.replace('weight', 'kernel')}"
        for ours, theirs in (
            ("obs_proj", "proto/obs"),
            ("feat_proj", "proto/feat"),
            ("slow_proj", "ema/proto/obs"),
        )
        for part in ("weight", "bias")
    },
}
GUMBEL = {"grad*_gumbel/*": "the gradient of a latent sample that worldloom does not use"}


class Case:
    """An agent of the reference with one of the losses."""

    def __init__(self, folder: str, loss: str, precision: str) -> None:
        self.agent, self.loss, self.dtype = Agent(folder), loss, DTYPES[precision]
        config = self.agent.config
        options: dict[str, Any] = {"name": loss}
        if loss == "r2dreamer":
            options["lambd"] = config["barlow_lambd"]
        if loss == "dreamerpro":
            options |= {k: v for k, v in config["dreamer_pro"].items() if k != "aug"}
            options["max_delta"] = int(config["dreamer_pro"]["aug"]["max_delta"])
            options["same_across_time"] = config["dreamer_pro"]["aug"]["same_across_time"]
        scales = {**self.agent.arguments["loss_scales"], **config["loss_scales"]}
        arguments = {**self.agent.arguments, "loss_scales": scales}
        self.model = DreamerV3(**{**arguments, "decoder": False, "representation": options})
        self.names = self.find_names()
        params, state = load(folder, "params.npz"), self.model.state_dict()
        for ours, theirs in self.names.items():
            if theirs in params:
                value = torch.from_numpy(params[theirs])
                if theirs != "proto/prototypes":
                    value = from_official(params[theirs])
                state[ours].copy_(value)
        prepare(self.model, precision).train()
        batch, self.noise = load(folder, "batch.npz"), load(folder, "noise.npz")
        self.shifts = batch.get("shift")
        self.sequences = self.read(batch)

    def find_names(self) -> dict[str, str]:
        """Return the official name of each of the model's tensors."""
        names = {**official_names(self.model), **NEW}
        for ours, theirs in official_names(self.model).items():
            if ours.startswith("encoder."):
                names[f"representation.slow_{ours}"] = f"ema/{theirs}"
        return {k: v for k, v in names.items() if k in self.model.state_dict()}

    def read(self, batch: dict[str, Any]) -> Sequences:
        """Return the recorded batch."""
        obs = {k.removeprefix("obs/"): v for k, v in batch.items()}
        action = {k.removeprefix("prevact/"): v for k, v in batch.items()}
        flags = [tensor(obs[k], self.dtype) for k in ("is_first", "is_last", "is_terminal")]
        return Sequences(
            self.agent.observation(obs, self.dtype),
            self.agent.action(action, self.dtype),
            tensor(obs["reward"], self.dtype),
            *flags,
            tensor(batch["carry/deter"], self.dtype),
            self.agent.flat(batch["carry/stoch"], self.dtype),
        )

    @contextmanager
    def draws(self, update: int) -> Iterator[None]:
        """Replace random numbers by those recorded."""
        shifts = None if self.shifts is None else tensor(self.shifts[update], self.dtype)
        with sampling(self.noise), mock.patch.object(dreamerpro, "draw_shifts", lambda *_: shifts):
            yield

    def posterior(self) -> tuple[Posterior, Tensor]:
        """Return what the loss sees, and the logits of the posterior."""
        seq = self.sequences
        tokens = self.model.encoder(seq.obs)
        deter, stoch, logits = self.model.rssm.observe(
            seq.deter, seq.stoch, tokens, seq.prev_actions, seq.is_first
        )
        return Posterior(seq, tokens, torch.cat([deter, stoch], -1)), logits

    def official(self, name: str, value: Tensor) -> Tensor:
        """Return a tensor in the layout of the reference."""
        return value if self.names[name] == "proto/prototypes" else to_official(value)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients by official name."""
        given = {k: p.grad for k, p in self.model.named_parameters() if p.grad is not None}
        return {self.names[k]: self.official(k, g) for k, g in given.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Return copies of all weights by official name."""
        state = self.model.state_dict()
        return {theirs: self.official(k, state[k]).clone() for k, theirs in self.names.items()}


cases = pytest.mark.parametrize("folder", agent_folders(FAMILY))
precisions = pytest.mark.parametrize("precision", PRECISIONS)


@precisions
@cases
def test_posterior(folder: str, precision: str) -> None:
    case = Case(folder, "infonce", precision)
    with case.draws(0):
        seen, logits = case.posterior()
    deter, stoch = seen.features.split([case.model.rssm.deter, seen.sequences.stoch.shape[-1]], -1)
    ours = {
        "tokens": seen.tokens,
        "feat": seen.features,
        "post/deter": deter,
        "post/stoch": case.agent.grouped(stoch),
        "post/logit": logits,
        "prior/logit": case.model.rssm.predict_prior(deter),
    }
    Recording(folder, "posterior.npz", precision).compare(ours, lambda _: "forward", at_least=6)


@precisions
@pytest.mark.parametrize("loss", LOSSES)
@cases
def test_loss_and_gradients(folder: str, loss: str, precision: str) -> None:
    case = Case(folder, loss, precision)
    recording = Recording(folder, f"loss_{loss}.npz", precision)
    module: Any = case.model.representation
    seen_by: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            for x in (inputs[0], output):
                if x.requires_grad:
                    x.retain_grad()
            seen_by[name] = inputs[0], output

        return hook

    for name in ("proj", "obs_proj", "feat_proj", "slow_proj"):
        if hasattr(module, name):
            getattr(module, name).register_forward_hook(watch(name))
    views: list[Any] = []
    observe = case.model.rssm.observe
    if loss == "dreamerpro":
        make_views = module.make_views
        module.make_views = lambda seq: views.append(make_views(seq)) or views[-1]
        case.model.rssm.observe = lambda *args: views.append(observe(*args)) or views[-1]
        module.freeze = 0  # the prototypes' gradient is recorded
    with case.draws(0):
        posterior, _ = case.posterior()
        posterior.features.retain_grad()
        terms = module.compute_terms(case.model, posterior)
        torch.stack(list(terms.values())).sum().backward()
    grads = case.gradients()
    ours: dict[str, Any] = {f"loss/{name}": term for name, term in terms.items()}
    ours |= {f"grad/{name}": grad for name, grad in grads.items()}
    ours |= {f"gradnorm/{name}": norm({"": grad}) for name, grad in grads.items()}
    if loss == "dreamerpro":
        ours |= prototype_arrays(module, seen_by, *views[-2:])
        ours["aug/post/stoch"] = case.agent.grouped(ours["aug/post/stoch"])
    else:
        ours |= projection_arrays(loss, posterior, seen_by["proj"][1])
    recording.compare(ours, lambda _: "gradient", left_out=GUMBEL, at_least=50)


def projection_arrays(loss: str, posterior: Posterior, x1: Tensor) -> dict[str, Any]:
    """Return what is recorded between the projection and the loss."""
    tokens = posterior.tokens.detach().flatten(0, 1)
    ours: dict[str, Any] = {"x1": x1, "gradin/x1": x1.grad, "gradin/feat": posterior.features.grad}
    if loss == "infonce":
        logits = x1 @ tokens.t()
        return {**ours, "logits": logits, "logprob": logits.log_softmax(-1).diagonal()}
    c = standardize(x1).t() @ standardize(tokens) / len(x1)
    off = c - torch.diag(c.diagonal())
    ours |= {"x1_norm": standardize(x1), "x2_norm": standardize(tokens), "c": c}
    return {
        **ours,
        "invariance": (c.diagonal() - 1).square().sum(),
        "redundancy": off.square().sum(),
    }


def prototype_arrays(
    module: Prototypes,
    seen_by: dict[str, tuple[Tensor, Tensor]],
    views: Sequences,
    posterior: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """Return what is recorded between the views and the terms of DreamerPro."""
    centers = F.normalize(module.prototypes, dim=-1)
    ours: dict[str, Any] = {"prototypes_unit": centers}
    raw = {"obs": seen_by["obs_proj"][1], "feat": seen_by["feat_proj"][1]}
    raw["ema"] = seen_by["slow_proj"][1]
    scores = {}
    for name, x in raw.items():
        unit = F.normalize(x, dim=-1)
        scores[name] = unit[:, module.warm_up :] @ centers.t()
        logprobs = (scores[name] / module.temperature).log_softmax(-1)
        parts = {"raw": x, "unit": unit, "norm": x.norm(dim=-1), "scores": scores[name]}
        parts["logprobs"] = logprobs
        ours |= {f"{name}/{part}": value for part, value in parts.items()}
    targets = [assign(view, *module.sinkhorn) for view in scores["ema"].detach().chunk(2)]
    ours |= {"targets": torch.cat(targets)}
    ours |= {"gradin/obs_raw": raw["obs"].grad, "gradin/feat_raw": raw["feat"].grad}
    ours |= {"gradin/feat": seen_by["feat_proj"][0].grad, "aug/tokens": seen_by["obs_proj"][0]}
    names = ("deter", "stoch", "logit")
    ours |= {f"aug/post/{k}": v for k, v in zip(names, posterior, strict=True)}
    for value in views.obs.values():
        if value.ndim == 5:
            ours["aug/image"] = value[:, :2].movedim(2, -1).round()
    return ours


@precisions
@pytest.mark.parametrize("loss", LOSSES)
@cases
def test_updates(folder: str, loss: str, precision: str) -> None:
    case = Case(folder, loss, precision)
    recording = Recording(folder, f"train_{loss}.npz", precision)
    module: Any = case.model.representation
    if loss == "dreamerpro":  # as a new model begins
        module.rescale()
        module.move_copies(case.model, torch.ones((), dtype=case.dtype))
    options = case.agent.config["opt"]
    optimizer = LaProp(
        [p for p in case.model.parameters() if p.requires_grad],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        agc=options["agc"],
        pmin=options["pmin"],
        warmup=case.agent.config["train"]["warmup"],
    )
    ours: dict[str, Any] = {}
    for update in range(case.agent.config["train"]["steps"]):
        optimizer.zero_grad()
        with case.draws(update):
            terms = module.compute_terms(case.model, case.posterior()[0])
        scales = case.agent.config["loss_scales"]
        torch.stack([scales[name] * term for name, term in terms.items()]).sum().backward()
        optimizer.step()
        ours |= {f"step{update}/loss/{name}": term.detach() for name, term in terms.items()}
        ours |= {f"step{update}/param/{name}": value for name, value in case.parameters().items()}
        module.after_update(case.model)
    recording.compare(ours, lambda _: "update", at_least=20)


# Stand-alone functions ------------------------------------------------------------------------


THEIRS = {
    f"{name}/*": "of their DreamerV3, which worldloom does not follow there"
    for name in ("kl", "actor", "laprop_warmup", "schedule", "latent/grad_gumbel")
} | {"latent/grad_gumbel": "the gradient of a latent sample that worldloom does not use"}


@precisions
def test_common(precision: str) -> None:
    folder = f"{FAMILY}/common"
    recording = Recording(folder, "common.npz", precision)
    config = json.loads((ROOT / folder / "config.json").read_text())
    ours: dict[str, Any] = {}
    for name in sorted({key.split("/")[1] for key in recording.arrays}):
        given = recording.group(f"in/{name}")
        x = {k: tensor(v, recording.dtype) for k, v in given.items()}
        part = name.partition("_")[0]
        found = FUNCTIONS[part](name, x, config) if part in FUNCTIONS else {}
        ours |= {
            f"{name}{key}" if key.startswith("_") else f"{name}/{key}": value
            for key, value in found.items()
        }
    recording.compare(ours, lambda _: "forward", left_out=THEIRS, at_least=40)


def barlow(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    x1, x2, lambd = x["x1"].requires_grad_(), x["x2"], float(x["lambd"])
    loss = barlow_loss(x1, x2, lambd)
    loss.backward()
    c = standardize(x1).t() @ standardize(x2) / len(x1)
    off = c - torch.diag(c.diagonal())
    parts = {"x1_norm": standardize(x1), "x2_norm": standardize(x2), "c": c, "grad_x1": x1.grad}
    parts["invariance"] = (c.diagonal() - 1).square().sum()
    return {**parts, "redundancy": off.square().sum(), "loss": loss}


def infonce(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    x1 = x["x1"].requires_grad_()
    loss = infonce_loss(x1, x["x2"])
    loss.backward()
    return {"loss": loss, "logits": x1 @ x["x2"].t(), "grad_x1": x1.grad}


def sinkhorn(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    return {"q": assign(x["scores"], float(x["eps"]), int(x["iters"]))}


def shift(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    images = x["image"].movedim(-1, 1).unsqueeze(1)  # one step per row
    crop = shift_sequences(images, x["shift"].long(), int(x["pad"]))
    return {"crop": crop.squeeze(1).movedim(1, -1)}


def bare_prototypes(prototypes: Tensor, **options: Any) -> Prototypes:
    """Return the module with given prototypes, for an encoder and features of another size."""
    model: Any = nn.Module()
    model.encoder, model.feature_dim = nn.Linear(3, 5), 4
    model.encoder.width = 5
    count, width = prototypes.shape
    module = Prototypes(model, num_prototypes=count, proto_dim=width, **options).to(prototypes)
    module.prototypes.data.copy_(prototypes)
    return module


def proto(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    module = bare_prototypes(x["prototypes"], **config["proto"], freeze_prototypes_iters=0)
    raw = {name: x[f"{name}_raw"].requires_grad_(name != "ema") for name in ("obs", "feat", "ema")}
    terms = module.compare(raw["obs"], raw["feat"], raw["ema"])
    ours: dict[str, Any] = {f"loss/{name}": term for name, term in terms.items()}
    inputs = {"obs_raw": raw["obs"], "feat_raw": raw["feat"], "prototypes": module.prototypes}
    for name, term in terms.items():
        grads = torch.autograd.grad(
            term, list(inputs.values()), retain_graph=True, allow_unused=True
        )
        named = zip(inputs, grads, strict=True)
        ours |= {f"grad_{name}/{key}": grad for key, grad in named if grad is not None}
    return ours


def ema(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for case, options in config["ema_cases"].items():
        module = bare_prototypes(
            x["prototypes"],
            ema_update_every=options["every"],
            ema_update_fraction=options["fraction"],
        )
        online = nn.Linear(3, 5, bias=False).to(x["copy"])
        model: Any = nn.Module()
        model.encoder = online
        module.slow_encoder = nn.Linear(3, 5, bias=False).to(x["copy"])
        module.slow_encoder.weight.data.copy_(x["copy"])
        copies = []
        for update, value in enumerate(x["online"]):
            online.weight.data.copy_(value)
            # Theirs moves before an update, and the first time all the way.
            if update == 0:
                module.rescale()
                module.move_copies(model, torch.ones((), dtype=value.dtype))
            else:
                module.after_update(model)
            copies.append(module.slow_encoder.weight.detach().clone())
        ours |= {f"{case}/copy": torch.stack(copies)}
        ours |= {f"{case}/prototypes": module.prototypes.detach()}
    return {f"_{key}": value for key, value in ours.items()}


def laprop(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    options = dict(config["laprop_cases"]["constant"])
    if name != "laprop_constant":
        return {}
    params = {k.removeprefix("param/"): nn.Parameter(v) for k, v in x.items() if "param/" in k}
    betas = options.pop("beta1"), options.pop("beta2")
    optimizer = LaProp(list(params.values()), betas=betas, **options)
    ours = {}
    for step in range(5):
        for key, p in params.items():
            p.grad = x[f"grad/{key}"][step]
        optimizer.step()
        ours |= {f"step{step}/param/{k}": p.detach().clone() for k, p in params.items()}
    return ours


def latent(name: str, x: dict[str, Tensor], config: Any) -> dict[str, Any]:
    logit = x["logit"].requires_grad_()
    with sampling({f"gumbel_{'x'.join(map(str, logit.shape))}": x["gumbel"].numpy()}):
        sample = sample_straight_through(unimix_probs(logit, config["unimix"]))
    (x["w"] * sample).sum().backward()
    return {"sample": sample, "grad_probs": logit.grad}


FUNCTIONS: dict[str, Any] = {
    function.__name__: function
    for function in (barlow, infonce, sinkhorn, shift, proto, ema, laprop, latent)
}


@pytest.mark.parametrize(
    "size", ["size12m", "size25m", "size50m", "size100m", "size200m", "size400m"]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_parameters_of_presets(loss: str, size: str) -> None:
    path = ROOT / FAMILY / "preset_counts.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    counts = json.loads(path.read_text())["presets"][f"size{size[4:].upper()}"]
    spaces = {
        "discrete": {"obs_shape": (3, 64, 64), "action_dim": 18, "discrete": True},
        "vision": {"obs_shape": (3, 64, 64), "action_dim": 6},
        "proprio": {"obs_shape": (24,), "action_dim": 6},
    }
    names = {"ema_encoder": "slow_encoder", "ema_obs_proj": "slow_proj", "projector": "proj"}
    for case, arguments in spaces.items():
        expected = counts[case][loss]
        with torch.device("meta"):
            model: Any = create_world_model(f"{loss}:{size}", **arguments, device="meta")
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == expected["trained"]
        for name in ("projector", "prototypes", "obs_proj", "feat_proj", "ema_encoder"):
            if name in expected:
                part = getattr(model.representation, names.get(name, name))
                parts = [part] if isinstance(part, Tensor) else part.parameters()
                assert sum(p.numel() for p in parts) == expected[name]
