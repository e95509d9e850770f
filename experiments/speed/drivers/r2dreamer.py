"""r2dreamer (NM512/r2dreamer, torch) with its DreamerV3 loss: decoder, no augmentation."""

import contextlib
import sys
from types import SimpleNamespace

import torch
from gymnasium.spaces import Box
from hydra import compose, initialize_config_dir
from worker import Implementation, Job, is_image, serve, torch_flops, torch_weights

# Official DreamerV3 sizes: units of a layer and of the recurrent state, classes of a category.
WIDTHS = {
    "size1m": {"units": 64, "deter": 512, "classes": 4, "depth": 4},
    "size12m": {"units": 256, "deter": 2048, "classes": 16, "depth": 16},
}


def build(job: Job) -> Implementation:
    sys.path.insert(0, job.folder)
    import dreamer
    from tensordict import TensorDict

    dreamer.autocast = lambda **_: contextlib.nullcontext()  # float32: no float16 on the CPU
    config = read_config(job)
    # Its settings look for this name of images; any other is a vector.
    name = "image" if is_image(job.obs) else "vector"
    obs_space = SimpleNamespace(spaces={name: Box(0, 255, random_obs(job).shape)})
    agent = dreamer.Dreamer(config, obs_space, Box(-1, 1, (job.actions,)))
    lead = (job.batch, job.length)
    flags = {
        f"is_{x}": torch.zeros(*lead, 1, dtype=torch.bool) for x in ("first", "last", "terminal")
    }
    batch = {name: random_obs(job, *lead), "reward": torch.randn(*lead, 1), **flags}
    batch["action"] = torch.rand(*lead, job.actions) * 2 - 1
    data = TensorDict(batch, batch_size=lead)
    context = agent.rssm.initial(job.batch)
    # A new TensorDict each time, because an update replaces the images by floats.
    sample = lambda: (data.clone(recurse=False), None, context)  # noqa: E731
    replay = SimpleNamespace(sample=sample, update=lambda *_: None)

    def update():
        return agent.update(replay)["opt/loss"].detach()

    state = agent.get_initial_state(1)

    def policy():
        nonlocal state
        seen = {name: random_obs(job, 1), "is_first": torch.zeros(1, 1, dtype=torch.bool)}
        action, state = agent.act(TensorDict(seen, batch_size=(1,)), state)
        return action

    trained = ("encoder", "rssm", "decoder", "reward", "cont", "actor", "value", "_slow_value")
    modules = {name: getattr(agent, name) for name in trained}
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    facts["parameters"] = sum(p.numel() for p in agent._named_params.values())
    tasks = {"update": update, "policy": policy}
    return Implementation(tasks, lambda: torch_weights(modules), facts)


def random_obs(job: Job, *lead):
    if is_image(job.obs):
        return torch.randint(0, 256, (*lead, *job.obs[1:], job.obs[0]), dtype=torch.uint8)
    return torch.randn(*lead, job.obs)


def read_config(job: Job):
    """Return its own settings at the official widths, as its train.py would read them."""
    width, env = WIDTHS[job.size], "dmc_vision" if is_image(job.obs) else "dmc_proprio"
    words = [f"env={env}", "device=cpu", "model.compile=false", "model.rep_loss=dreamer"]
    words += [f"model.units={width['units']}", f"model.hidden={width['units']}"]
    words += [f"model.deter={width['deter']}", f"model.discrete={width['classes']}"]
    words += [f"model.depth={width['depth']}", f"model.imag_horizon={job.horizon}"]
    with initialize_config_dir(f"{job.folder}/configs", version_base=None):
        return compose("configs", words).model


if __name__ == "__main__":
    serve(build)
