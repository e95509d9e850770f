"""dreamerv3-torch (NM512/dreamerv3-torch): DreamerV3 as first published, at the same widths."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import ruamel.yaml
import torch
from gymnasium.spaces import Box
from worker import WIDTHS, Implementation, Job, serve, torch_flops, torch_weights

warnings.filterwarnings("ignore", message=".*torch.cuda.amp.*")


def build(job: Job) -> Implementation:
    sys.path.insert(0, job.folder)
    import models
    import networks

    for net in (networks.MLP, networks.RSSM):  # some calls leave out the device
        values = net.__init__.__defaults__ or ()
        net.__init__.__defaults__ = tuple("cpu" if x == "cuda" else x for x in values)
    config = read_config(job)
    obs_space = SimpleNamespace(spaces={"vector": Box(-10, 10, (job.obs,))})
    world = models.WorldModel(obs_space, Box(-1, 1, (job.actions,)), 0, config)
    behaviour = models.ImagBehavior(config, world)
    rng, lead = np.random.default_rng(0), (job.batch, job.length)
    batch = {key: np.zeros(lead, np.float32) for key in ("is_first", "is_terminal")}
    batch["is_first"][:, 0] = 1  # its own batches always begin as if an episode did
    batch |= {"vector": rng.normal(size=(*lead, job.obs)), "reward": rng.normal(size=lead)}
    batch["action"] = rng.uniform(-1, 1, (*lead, job.actions))
    batch["image"] = np.zeros(1)  # divided by 255 whether there is one or not
    batch = {key: np.float32(value) for key, value in batch.items()}

    def reward(feat, state, action):
        return world.heads["reward"](world.dynamics.get_feat(state)).mode()

    def update():
        post, _, metrics = world._train(batch)
        metrics |= behaviour._train(post, reward)[-1]
        return sum(float(metrics[f"{name}_loss"]) for name in ("model", "actor", "value"))

    heads = {"actor": behaviour.actor, "value": behaviour.value, "slow": behaviour._slow_value}
    modules = {"encoder": world.encoder, "dynamics": world.dynamics, **world.heads, **heads}
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    trained = (world, behaviour.actor, behaviour.value)
    facts["parameters"] = sum(p.numel() for module in trained for p in module.parameters())
    return Implementation({"update": update}, lambda: torch_weights(modules), facts)


def read_config(job: Job):
    """Return its own settings for vectors, with official widths and depths where it has options."""
    file, width = Path(job.folder) / "configs.yaml", WIDTHS[job.size]
    presets = ruamel.yaml.YAML(typ="safe").load(file.read_text())
    config = presets["defaults"] | {k: presets["dmc_proprio"][k] for k in ("encoder", "decoder")}
    for name in ("encoder", "decoder"):
        layers = {"mlp_layers": 3, "mlp_units": width["units"]}
        config[name] = presets["defaults"][name] | config[name] | layers
    for name, layers in {"actor": 3, "critic": 3, "reward_head": 1, "cont_head": 1}.items():
        config[name]["layers"] = layers
    config |= {"dyn_hidden": width["units"], "units": width["units"]}
    config |= {"dyn_deter": width["deter"], "dyn_discrete": width["classes"]}
    config |= {"device": "cpu", "compile": False, "imag_horizon": job.horizon}
    config |= {"num_actions": job.actions}
    return SimpleNamespace(**config)


if __name__ == "__main__":
    serve(build)
