"""sheeprl 0.8.4 (package registry): `dreamer_v3_5`, the present DreamerV3, at the same sizes."""

import hydra
import torch
from gymnasium.spaces import Box
from gymnasium.spaces import Dict as DictSpace
from hydra import compose, initialize_config_module
from lightning import Fabric
from worker import Implementation, Job, is_image, serve, torch_flops, torch_weights


def build(job: Job) -> Implementation:
    from sheeprl.algos.dreamer_v3_5.agent import build_agent
    from sheeprl.algos.dreamer_v3_5.dreamer_v3_5 import train, update_target_critic
    from sheeprl.algos.dreamer_v3_5.utils import Moments, prepare_obs

    config = read_config(job)
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.fabric.precision)
    box = Box(0, 255, job.obs, "uint8") if is_image(job.obs) else Box(-10, 10, (job.obs,))
    space = DictSpace({"obs": box})
    agent = build_agent(fabric, (job.actions,), True, config, space)
    world, actor, critic, slow, player = agent
    trained = (world, actor, critic)
    weights = [p for module in trained for p in module.parameters()]
    made = hydra.utils.instantiate(config.algo.optimizer, params=weights, _convert_="all")
    optimizer = fabric.setup_optimizers(made)
    options = config.algo.actor.moments
    moments = Moments(options.decay, options.max, options.percentile.low, options.percentile.high)
    batch, losses = random_batch(job, config), []
    backward = fabric.backward
    fabric.backward = lambda loss, **k: (losses.append(loss.detach()), backward(loss, **k))

    def update():
        losses.clear()
        train(fabric, config, world, actor, critic, slow, optimizer, moments, dict(batch), None,
              (job.actions,))  # fmt: skip
        update_target_critic(critic, slow, config.algo.critic.tau)
        return losses[0]

    player.init_states()
    images = ["obs"] * is_image(job.obs)

    @torch.inference_mode()
    def policy():
        seen = prepare_obs(fabric, {"obs": random_obs(job, 1).numpy()}, cnn_keys=images, num_envs=1)
        return [action.numpy() for action in player.get_actions(seen)]

    modules = {"encoder": world.encoder, "rssm": world.rssm, "decoder": world.observation_model}
    modules |= {"reward": world.reward_model, "continue": world.continue_model}
    modules |= {"actor": actor, "critic": critic, "slow critic": slow}
    facts = {"version": f"torch {torch.__version__}", "flops": torch_flops(update)}
    facts["parameters"] = sum(p.numel() for p in weights)
    tasks = {"update": update, "policy": policy}
    return Implementation(tasks, lambda: torch_weights(modules), facts)


def random_obs(job: Job, *lead):
    if is_image(job.obs):
        return torch.randint(0, 256, (*lead, *job.obs), dtype=torch.uint8)
    return torch.randn(*lead, job.obs)


def random_batch(job: Job, config):
    """Draw T + 1 rows (one of context) of B environments, time first, from within episodes."""
    lead, model = (job.length + config.algo.replay_context, job.batch), config.algo.world_model
    batch = {key: torch.zeros(*lead, 1) for key in ("is_first", "terminated", "truncated")}
    batch |= {"obs": random_obs(job, *lead), "rewards": torch.randn(*lead, 1)}
    batch["deter"] = torch.zeros(*lead, model.recurrent_model.recurrent_state_size).half()
    batch["stoch"] = torch.zeros(*lead, model.stochastic_size, dtype=torch.uint8)
    return batch | {"actions": torch.rand(*lead, job.actions) * 2 - 1}


def read_config(job: Job):
    """Return its own settings of this size."""
    from omegaconf import OmegaConf
    from sheeprl.utils.utils import dotdict

    words = ["exp=dreamer_v3_5", "env=dummy", f"algo=dreamer_v3_5_{job.size[4:].upper()}"]
    used, unused = ("cnn", "mlp") if is_image(job.obs) else ("mlp", "cnn")
    words += [f"algo.{used}_keys.encoder=[obs]", f"algo.{unused}_keys.encoder=[]"]
    words += [f"algo.horizon={job.horizon}"]
    words += [f"algo.per_rank_batch_size={job.batch}"]
    words += [f"algo.per_rank_sequence_length={job.length}"]
    with initialize_config_module("sheeprl.configs", version_base="1.3"):
        config = compose("config", words)
    used = ("algo", "distribution", "env", "fabric")
    return dotdict({key: OmegaConf.to_container(config[key], resolve=True) for key in used})


if __name__ == "__main__":
    serve(build)
