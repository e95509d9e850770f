"""worldloom itself: update, and a decision or plan for one environment and for several at once."""

import numpy as np
import torch
from worker import Implementation, Job, is_image, serve, torch_flops, torch_weights

from worldloom.acting import Actor
from worldloom.bench import BenchConfig, TrainedModel
from worldloom.memory import keep_freed_memory
from worldloom.training.precision import computing_in


def build(job: Job) -> Implementation:
    tdmpc2 = job.size == "5m"
    preset = f"{'tdmpc2' if tdmpc2 else 'dreamerv3'}:{job.size}"
    torch.manual_seed(0)
    length = job.horizon + 1 if tdmpc2 else job.length
    sizes = {"batch": job.batch, "length": length, "obs": job.obs, "actions": job.actions}
    config = BenchConfig(model=preset, **sizes)
    # The horizon of DreamerV3's imagination; what it calls its horizon is that of the discount.
    trained = TrainedModel(config, **{"horizon" if tdmpc2 else "imag_length": job.horizon})
    model, optimizer = trained.model, trained.optimizer
    batch = trained.random_batch(config)

    def update():
        model.train()
        with computing_in(job.precision, trained.device):
            loss = model.compute_loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if hasattr(model, "after_update"):
            model.after_update()
        return loss.detach()

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    facts["parameters"] = parameters
    one, many = decisions(model, job, 1), decisions(model, job, job.envs)
    if tdmpc2:
        facts["plan flops"] = torch_flops(one)
        tasks = {"update": update, "plan, 1 env": one, f"plan, {job.envs} envs": many}
    else:
        tasks = {"update": update, "policy": one}
    modules = dict(model.named_children())
    modules = {name: module for name, module in modules.items() if list(module.parameters())}
    return Implementation(tasks, lambda: torch_weights(modules), facts)


def decisions(model, job: Job, envs: int):
    """Return a function that acts once in `envs` environments, in the middle of episodes."""
    actor, rng = Actor(model, precision=job.precision), np.random.default_rng(0)
    no = np.zeros(envs, bool)
    memory = actor(observe(rng, job, envs), ~no)[1]

    def act():
        nonlocal memory
        model.eval()
        action, memory = actor(observe(rng, job, envs), no, memory)
        return action

    return act


def observe(rng, job: Job, envs: int):
    """Return random observations: vectors, or images of uint8."""
    if is_image(job.obs):
        return rng.integers(0, 256, (envs, *job.obs), np.uint8)
    return rng.normal(size=(envs, job.obs)).astype(np.float32)


if __name__ == "__main__":
    keep_freed_memory()  # as worldloom.run does
    serve(build)
