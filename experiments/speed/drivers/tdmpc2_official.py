"""Official TD-MPC2 (nicklashansen/tdmpc2, torch): its own agent, on the CPU, no environment."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import OmegaConf
from worker import Implementation, Job, absolute_sum, serve, torch_flops


def build(job: Job) -> Implementation:
    code = Path(job.folder) / "tdmpc2"
    sys.path.insert(0, str(code))
    load_for_cpu("common.scale", code / "common" / "scale.py")
    config = read_config(job, code)
    agent = load_for_cpu("tdmpc2", code / "tdmpc2.py").TDMPC2(config)
    rows = (config.horizon, config.batch_size)
    batch = (
        torch.randn(config.horizon + 1, config.batch_size, job.obs),
        torch.rand(*rows, job.actions) * 2 - 1,
        torch.randn(*rows, 1),
        torch.zeros(*rows, 1),
        None,
    )
    replay = SimpleNamespace(sample=lambda: batch)

    def update():
        return agent.update(replay)["total_loss"]

    def plan():
        return agent.act(torch.randn(job.obs))

    model, optimized = agent.model, [agent.optim, agent.pi_optim]
    groups = [group for optimizer in optimized for group in optimizer.param_groups]
    parts = [[p for p in group["params"] if not p.is_meta] for group in groups]
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    facts |= {"parameters": sum(p.numel() for part in parts for p in part)}
    facts |= {"plan flops": torch_flops(plan)}

    def weights():
        slow = model._target_Qs_params.values(include_nested=True, leaves_only=True)
        named = {f"group {i}": part for i, part in enumerate(parts) if part} | {"slow Q": slow}
        return {name: absolute_sum(tensors) for name, tensors in named.items()}

    return Implementation({"update": update, "plan, 1 env": plan}, weights, facts)


def load_for_cpu(name, file):
    """Import a file with its hard-coded GPU replaced, in memory."""
    spec = spec_from_file_location(name, file)
    module = module_from_spec(spec)
    source = file.read_text().replace("'cuda:0'", "'cpu'")
    source = source.replace("capturable=True", "capturable=False")  # an option for CUDA graphs
    # The Q ensemble holds shapes without data, which newer versions of torch refuse to move.
    source = source.replace("WorldModel(cfg).to(self.device)", "WorldModel(cfg)")
    sys.modules[name] = module
    exec(compile(source, str(file), "exec"), module.__dict__)
    return module


def read_config(job: Job, code: Path):
    """Return its own settings of the model with 5 M parameters, as its parser would."""
    from common import MODEL_SIZE
    from common.parser import cfg_to_dataclass

    config = OmegaConf.load(code / "config.yaml")
    given = [key for key in config if not OmegaConf.is_missing(config, key)]
    config = OmegaConf.masked_copy(config, given)
    config.update(MODEL_SIZE[int(job.size.removesuffix("m"))])
    config.update({"compile": False, "multitask": False, "task_dim": 0, "tasks": ["none"]})
    config.update({"obs_shape": {"state": [job.obs]}, "action_dim": job.actions})
    config.update({"episode_length": 500, "steps": 1_000_000, "batch_size": job.batch})
    config.update(
        {"horizon": job.horizon, "bin_size": (config.vmax - config.vmin) / (config.num_bins - 1)}
    )
    return cfg_to_dataclass(config)


if __name__ == "__main__":
    serve(build)
