"""sheeprl (Eclectic-Sheep/sheeprl): DreamerV3 as first published, at the same widths."""

import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import hydra
import torch
from gymnasium.spaces import Box
from gymnasium.spaces import Dict as DictSpace
from hydra import compose, initialize_config_dir
from lightning import Fabric
from worker import WIDTHS, Implementation, Job, serve, torch_flops, torch_weights


def build(job: Job) -> Implementation:
    code = Path(job.folder) / "sheeprl"
    stub_imports(code)
    from sheeprl.algos.dreamer_v3.agent import build_agent
    from sheeprl.algos.dreamer_v3.dreamer_v3 import train
    from sheeprl.algos.dreamer_v3.utils import Moments

    fabric = Fabric(accelerator="cpu", devices=1)
    config = read_config(job, code)
    torch.set_float32_matmul_precision("highest")
    obs_space = DictSpace({"vector": Box(-10, 10, (job.obs,))})
    agent = build_agent(fabric, (job.actions,), True, config, obs_space)
    world, actor, critic, target = agent[:4]
    made = [
        hydra.utils.instantiate(section.optimizer, params=module.parameters(), _convert_="all")
        for section, module in (
            (config.algo.world_model, world),
            (config.algo.actor, actor),
            (config.algo.critic, critic),
        )
    ]
    optimizers = fabric.setup_optimizers(*made)
    options = config.algo.actor.moments
    moments = Moments(options.decay, options.max, options.percentile.low, options.percentile.high)
    batch = random_batch(job)
    backward, losses = fabric.backward, []
    fabric.backward = lambda loss: (losses.append(loss.detach()), backward(loss))

    def update():
        losses.clear()
        for fast, slow in zip(critic.module.parameters(), target.parameters(), strict=True):
            slow.data.copy_(
                config.algo.critic.tau * fast.data + (1 - config.algo.critic.tau) * slow.data
            )
        train(fabric, world, actor, critic, target, *optimizers, dict(batch), None, config, True,
              (job.actions,), moments)  # fmt: skip
        return sum(losses)

    modules = {"encoder": world.encoder, "rssm": world.rssm, "decoder": world.observation_model}
    modules |= {"reward": world.reward_model, "continue": world.continue_model}
    modules |= {"actor": actor, "critic": critic, "target": target}
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    trained = (world, actor, critic)
    facts["parameters"] = sum(p.numel() for module in trained for p in module.parameters())
    return Implementation({"update": update}, lambda: torch_weights(modules), facts)


def stub_imports(code: Path):
    """Skip the package's own imports (all algorithms) and modules for video and environments."""
    package = ModuleType("sheeprl")
    package.__path__ = [str(code)]
    sys.modules["sheeprl"] = package
    for name in ("cv2", "moviepy", "sheeprl.utils.env", "sheeprl.envs.wrappers"):
        sys.modules[name] = MagicMock()


def random_batch(job: Job):
    """Draw sequences of T rows for B environments, time first, from the middle of episodes."""
    lead = (job.length, job.batch)
    batch = {key: torch.zeros(*lead, 1) for key in ("is_first", "terminated", "truncated")}
    batch |= {"vector": torch.randn(*lead, job.obs), "rewards": torch.randn(*lead, 1)}
    return batch | {"actions": torch.rand(*lead, job.actions) * 2 - 1}


def read_config(job: Job, code: Path):
    """Return its own settings, with official widths and depths where it has options."""
    from omegaconf import OmegaConf
    from sheeprl.utils.utils import dotdict

    width = WIDTHS[job.size]
    model = "algo.world_model."
    words = ["exp=dreamer_v3", "env=dummy", "algo=dreamer_v3_XS", f"algo.horizon={job.horizon}"]
    words += ["algo.cnn_keys.encoder=[]", "algo.mlp_keys.encoder=[vector]"]
    words += ["algo.cnn_keys.decoder=[]", "algo.mlp_keys.decoder=[vector]"]
    words += [f"algo.dense_units={width['units']}", "algo.mlp_layers=3"]
    words += [f"{model}discrete_size={width['classes']}", f"{model}reward_model.mlp_layers=1"]
    words += [f"{model}recurrent_model.recurrent_state_size={width['deter']}"]
    words += [
        f"{model}{x}_model.hidden_size={width['units']}" for x in ("transition", "representation")
    ]
    words += [f"{model}discount_model.mlp_layers=1"]
    words += [
        f"algo.per_rank_batch_size={job.batch}",
        f"algo.per_rank_sequence_length={job.length}",
    ]
    with initialize_config_dir(str(code / "configs"), version_base="1.3"):
        config = compose("config", words)
    used = ("algo", "distribution", "env")
    return dotdict({key: OmegaConf.to_container(config[key], resolve=True) for key in used})


if __name__ == "__main__":
    serve(build)
