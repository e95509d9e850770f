"""What the official configurations set: the value, its source, and how units are converted.

`DREAMERV3` and `TDMPC2` list every setting of the published protocols, which are in
conf/experiment, that can affect learning. A source without a file is a key of the repository's
configuration: dreamerv3/configs.yaml (below `defaults`, or in the block of the protocol; env.atari*
is env.atari100k or env.atari) and tdmpc2/config.yaml.
"""

from typing import Any, NamedTuple

SOURCES = {
    "dreamerv3": "danijar/dreamerv3, commit e3f0224, dreamerv3/configs.yaml",
    "tdmpc2": "nicklashansen/tdmpc2, commit e9f5932, tdmpc2/config.yaml",
    "r2dreamer": "NM512/r2dreamer, commit 546e4fa, configs/*.yaml and runs/*.sh",
}


class Official(NamedTuple):
    """An official value: the same for all protocols of a family, or a `By`."""

    value: Any
    source: str  # [file: ]key
    note: str = ""  # where ours and the official units, or names, differ


class By(dict):
    """Values by protocol; the setting does not exist in the others."""


def _split(small: Any, large: Any) -> By:
    """Return the values of size1m, for dmc_proprio, and of size200m, for the other protocols."""
    others = ("dmc_vision", "atari100k", "atari", "crafter")
    return By(dmc_proprio=small, **dict.fromkeys(others, large))


def _atari(hundred: Any, full: Any) -> By:
    return By(atari100k=hundred, atari=full)


def _dmc(value: Any) -> By:
    return By(dmc_proprio=value, dmc_vision=value)


# Settings without an effect on learning, or on the environments from which a run collects.
NO_EFFECT = {
    "env.workers": "the rows are the same in every case",
    "env.timeout": "seconds until a worker is replaced",
    "training.log_every": "curves",
    "evaluation.episodes": "environments of its own; so for the next ones",
    "evaluation.every": "",
    "evaluation.episodes_during": "",
    "evaluation.num_envs": "",
    "evaluation.max_steps": "",
    "evaluation.seed": "",
    "evaluation.videos": "",
    "evaluation.decisions": "",
    "data.storage": "memory or files",
    "optimizer._partial_": "how Hydra calls it",
}

ATARI = "embodied/envs/atari.py"
SAME = "nothing is left out or changed"

DREAMERV3 = {
    "seed": Official(0, "seed"),
    "init_from": Official(None, "run.from_checkpoint"),
    "nonfinite": Official("stop", "none", "a run with finite losses is the same"),
    "trainer.precision": Official("bf16-mixed", "jax.compute_dtype", "with trainer=gpu"),
    # ---- environments
    "env.num_envs": Official(
        By(dmc_proprio=16, dmc_vision=16, atari100k=1, atari=16, crafter=1), "run.envs"
    ),
    "env._target_": Official(
        By(
            dmc_proprio="worldloom.envs.suites.dmc.make_env",
            dmc_vision="worldloom.envs.suites.dmc.make_env",
            atari100k="worldloom.envs.suites.atari.make_env",
            atari="worldloom.envs.suites.atari.make_env",
            crafter="worldloom.envs.suites.crafter.make_env",
        ),
        "task",
        "the part in front of the first _",
    ),
    "env.task": Official(_dmc("walker-walk"), "task", "dmc_walker_walk"),
    "env.game": Official(_atari("pong", "pong"), "task", "atari100k_pong and atari_pong"),
    "env.reward": Official(By(crafter=True), "task", "crafter_reward"),
    "env.protocol": Official(
        _atari("atari100k", "atari"), "task", "selects env.atari100k or atari"
    ),
    "env.action_repeat": Official(
        By(_dmc(1), crafter=1, atari100k=4, atari=4), "env.dmc.repeat, env.atari*.repeat"
    ),
    "env.time_limit": Official(
        By(_dmc(1000), crafter=10_000, atari100k=108_000, atari=108_000),
        f"dm_control.suite.load; crafter.Env: length; {ATARI}: length",
        "frames or simulator steps; Atari's limit is a termination officially, here a truncation",
    ),
    "env.pixels": Official(
        By(dmc_proprio=False, dmc_vision=True, atari100k=True, atari=True, crafter=True),
        "env.dmc.image, env.dmc.proprio",
    ),
    "env.image_size": Official(
        By(dmc_proprio=None, dmc_vision=64, atari100k=64, atari=96, crafter=64),
        "env.dmc.size, env.atari*.size, env.crafter.size",
    ),
    "env.camera": Official(
        _dmc(None), "env.dmc.camera: -1", "embodied/envs/dmc.py: 2 for quadruped, else 0"
    ),
    "env.gray": Official(_atari(False, True), "env.atari*.gray"),
    "env.actions": Official(_atari("needed", "all"), "env.atari*.actions"),
    "env.sticky": Official(_atari(0.0, 0.25), "env.atari*.sticky", f"{ATARI}: true is 0.25"),
    "env.pooling": Official(_atari(2, 2), f"{ATARI}: pooling, with the maximum (aggregate)"),
    "env.noops": Official(_atari(30, 30), "env.atari*.noops"),
    "env.lives": Official(_atari("unused", "unused"), "env.atari*.lives"),
    "env.frame_stack": Official(1, "none", SAME),
    "env.obs.keep": Official(None, "none", SAME),
    "env.obs.image": Official(None, "none", SAME),
    "env.obs.vector": Official(None, "none", SAME),
    # ---- amount of training, and replay
    "training.total_steps": Official(
        By(_dmc(1_100_000), atari100k=110_000, atari=51_000_000, crafter=1_100_000),
        "run.steps",
        "decisions, as here, of action_repeat frames each",
    ),
    "training.batch_size": Official(16, "batch_size"),
    "training.sequence_length": Official(64, "batch_length"),
    "training.train_ratio": Official(
        By(dmc_proprio=1024, dmc_vision=256, atari100k=256, atari=32, crafter=512),
        "run.train_ratio",
    ),
    "training.prefill": Official(
        None, "embodied/run/train.py: trainfn", "null is batch_size * batch_length"
    ),
    "training.random_steps": Official(0, "random_agent"),
    "training.seed_episodes": Official(0, "none"),
    "training.prefill_counts": Official(
        "starts", "embodied/run/train.py: trainfn", "len(replay) counts start positions"
    ),
    "training.count_resets": Official(True, "embodied/run/train.py: driver.on_step"),
    "training.pretrain": Official(False, "elements.when.Ratio: it starts at its first call"),
    "data.capacity": Official(5_000_000, "replay.size"),
    "data.across_episodes": Official(True, "embodied/core/replay.py: _getseq"),
    "data.draw_by": Official("start", "embodied/core/selectors.py: Uniform"),
    "data.finished_episodes": Official(False, "embodied/core/replay.py: add"),
    "data.online_queue": Official(True, "replay.online"),
    "data.overlap": Official(False, "embodied/run/train.py: one loop"),
    "evaluation.deterministic": Official(False, "embodied/run/train.py: mode='train'"),
    "evaluation.keep_best": Official(False, "run.save_every: the newest checkpoint"),
    # ---- optimiser
    "optimizer._target_": Official(
        "worldloom.training.optimizers.LaProp", "agent.opt.momentum", "embodied/jax/opt.py"
    ),
    "optimizer.lr": Official(4e-5, "agent.opt.lr"),
    "training.learning_rate": Official(4e-5, "agent.opt.lr"),
    "optimizer.betas": Official([0.9, 0.999], "agent.opt.beta1, agent.opt.beta2"),
    "optimizer.eps": Official(1e-20, "agent.opt.eps"),
    "optimizer.agc": Official(0.3, "agent.opt.agc"),
    "training.grad_clip": Official(None, "agent.opt.agc", "per tensor, and no other"),
    "optimizer.weight_decay": Official(0.0, "agent.opt.wd"),
    "optimizer.warmup": Official(1000, "agent.opt.warmup"),
    "training.warmup": Official(1000, "agent.opt.warmup"),
    "optimizer.anneal": Official(0, "agent.opt.anneal", "schedule const"),
    "training.anneal": Official(0, "agent.opt.anneal"),
    # ---- model
    "model._target_": Official("worldloom.models.dreamerv3.DreamerV3", "agent"),
    "model.units": Official(_split(64, 1024), r"agent: .*\.units"),
    "model.depth": Official(_split(4, 64), r"agent: .*\.depth"),
    "model.deter": Official(_split(512, 8192), "agent.dyn.rssm.deter"),
    "model.hidden": Official(_split(64, 1024), "agent.dyn.rssm.hidden"),
    "model.classes": Official(_split(4, 64), "agent.dyn.rssm.classes"),
    "model.stoch": Official(32, "agent.dyn.rssm.stoch"),
    "model.blocks": Official(8, "agent.dyn.rssm.blocks"),
    "model.dyn_layers": Official(1, "agent.dyn.rssm.dynlayers"),
    "model.img_layers": Official(2, "agent.dyn.rssm.imglayers"),
    "model.obs_layers": Official(1, "agent.dyn.rssm.obslayers"),
    "model.absolute": Official(False, "agent.dyn.rssm.absolute"),
    "model.unimix": Official(0.01, "agent.dyn.rssm.unimix"),
    "model.free_nats": Official(1.0, "agent.dyn.rssm.free_nats"),
    "model.obs_classes": Official(None, "none", "no protocol observes integers"),
    "model.encoder.layers": Official(3, "agent.enc.simple.layers"),
    "model.encoder.mults": Official([2, 3, 4, 4], "agent.enc.simple.mults"),
    "model.encoder.kernel": Official(5, "agent.enc.simple.kernel"),
    "model.encoder.symlog": Official(True, "agent.enc.simple.symlog"),
    "model.decoder.layers": Official(3, "agent.dec.simple.layers"),
    "model.decoder.mults": Official([2, 3, 4, 4], "agent.dec.simple.mults"),
    "model.decoder.kernel": Official(5, "agent.dec.simple.kernel"),
    "model.decoder.bspace": Official(8, "agent.dec.simple.bspace"),
    "model.reward_head.layers": Official(1, "agent.rewhead.layers"),
    "model.reward_head.bins": Official(255, "agent.rewhead.bins"),
    "model.reward_head.outscale": Official(0.0, "agent.rewhead.outscale"),
    "model.continue_head.layers": Official(1, "agent.conhead.layers"),
    "model.continue_head.outscale": Official(1.0, "agent.conhead.outscale"),
    "model.actor.layers": Official(3, "agent.policy.layers"),
    "model.actor.minstd": Official(0.1, "agent.policy.minstd"),
    "model.actor.maxstd": Official(1.0, "agent.policy.maxstd"),
    "model.actor.outscale": Official(0.01, "agent.policy.outscale"),
    "model.critic.layers": Official(3, "agent.value.layers"),
    "model.critic.bins": Official(255, "agent.value.bins"),
    "model.critic.outscale": Official(0.0, "agent.value.outscale"),
    "model.slow_critic.rate": Official(0.02, "agent.slowvalue.rate"),
    "model.slow_critic.every": Official(1, "agent.slowvalue.every"),
    "model.loss_scales.rec": Official(1.0, "agent.loss_scales.rec"),
    "model.loss_scales.rew": Official(1.0, "agent.loss_scales.rew"),
    "model.loss_scales.con": Official(1.0, "agent.loss_scales.con"),
    "model.loss_scales.dyn": Official(1.0, "agent.loss_scales.dyn"),
    "model.loss_scales.rep": Official(0.1, "agent.loss_scales.rep"),
    "model.loss_scales.policy": Official(1.0, "agent.loss_scales.policy"),
    "model.loss_scales.value": Official(1.0, "agent.loss_scales.value"),
    "model.loss_scales.repval": Official(0.3, "agent.loss_scales.repval"),
    "model.representation": Official("decoder", "agent.dec"),
    "model.reward_grad": Official(True, "agent.reward_grad"),
    "model.actor_critic": Official(True, "none", "without them nothing acts"),
    "model.imag_length": Official(15, "agent.imag_length"),
    "model.imag_last": Official(0, "agent.imag_last"),
    "model.horizon": Official(333, "agent.horizon"),
    "model.contdisc": Official(True, "agent.contdisc"),
    "model.imag_loss.lam": Official(0.95, "agent.imag_loss.lam"),
    "model.imag_loss.actent": Official(3e-4, "agent.imag_loss.actent"),
    "model.imag_loss.slowreg": Official(1.0, "agent.imag_loss.slowreg"),
    "model.imag_loss.slowtar": Official(False, "agent.imag_loss.slowtar"),
    "model.repl_loss.lam": Official(0.95, "agent.repl_loss.lam"),
    "model.repl_loss.slowreg": Official(1.0, "agent.repl_loss.slowreg"),
    "model.repl_loss.slowtar": Official(False, "agent.repl_loss.slowtar"),
    "model.retnorm.impl": Official("perc", "agent.retnorm.impl"),
    "model.retnorm.rate": Official(0.01, "agent.retnorm.rate"),
    "model.retnorm.limit": Official(1.0, "agent.retnorm.limit"),
    "model.retnorm.perclo": Official(5.0, "agent.retnorm.perclo"),
    "model.retnorm.perchi": Official(95.0, "agent.retnorm.perchi"),
    "model.retnorm.debias": Official(False, "agent.retnorm.debias"),
    "model.valnorm.impl": Official("none", "agent.valnorm.impl"),
    "model.valnorm.rate": Official(0.01, "agent.valnorm.rate"),
    "model.valnorm.limit": Official(1e-8, "agent.valnorm.limit"),
    "model.advnorm.impl": Official("none", "agent.advnorm.impl"),
    "model.advnorm.rate": Official(0.01, "agent.advnorm.rate"),
    "model.advnorm.limit": Official(1e-8, "agent.advnorm.limit"),
    "model.repval_loss": Official(True, "agent.repval_loss"),
    "model.repval_grad": Official(True, "agent.repval_grad"),
    "model.ac_grads": Official(False, "agent.ac_grads"),
    "model.replay_context": Official(True, "replay_context", "one row in front of each sequence"),
}

DMC = "tdmpc2/envs/dmcontrol.py"
WORLD = "tdmpc2/envs/metaworld.py"
MUJOCO = "tdmpc2/envs/mujoco.py"
SEEDING = "tdmpc2/envs/__init__.py: seed_steps"
FOUR = ("dmc", "dmc_pixels", "metaworld", "mujoco")


def _each(dmc: Any, pixels: Any, metaworld: Any, mujoco: Any) -> By:
    return By(zip(FOUR, (dmc, pixels, metaworld, mujoco), strict=True))


TDMPC2 = {
    "seed": Official(1, "seed"),
    "init_from": Official(None, "none"),
    "nonfinite": Official("stop", "none", "a run with finite losses is the same"),
    "trainer.precision": Official("32-true", "tdmpc2/train.py", "officially with TF32 on GPUs"),
    # ---- environments
    "env.num_envs": Official(1, "tdmpc2/trainer/online_trainer.py: one environment"),
    "env._target_": Official(
        _each(
            "worldloom.envs.suites.dmc.make_env",
            "worldloom.envs.suites.dmc.make_env",
            "worldloom.envs.suites.metaworld.make_env",
            "worldloom.envs.suites.gymnasium.make_env",
        ),
        "task",
    ),
    "env.task": Official(
        By(dmc="dog-run", dmc_pixels="walker-walk", metaworld="assembly"),
        "task; README.md: obs=rgb, mw-assembly",
        "Meta-World is version 2 officially, here 3",
    ),
    "env.id": Official(By(mujoco="HalfCheetah-v4"), f"{MUJOCO}: mujoco-halfcheetah"),
    "env.action_repeat": Official(_each(2, 2, 2, 1), f"{DMC}, {WORLD}: range(2) in step"),
    "env.time_limit": Official(
        _each(1000, 1000, 200, 1000),
        f"{DMC}, {WORLD}, {MUJOCO}: max_episode_steps 500, 500, 100, 1000",
        "decisions officially, here simulator steps: times action_repeat",
    ),
    "env.pixels": Official(_each(False, True, False, False), "obs"),
    "env.image_size": Official(_each(None, 64, None, None), f"{DMC}: Pixels, size"),
    "env.frame_stack": Official(_each(1, 3, 1, 1), f"{DMC}: Pixels, num_frames"),
    "env.camera": Official(
        By(dmc=None, dmc_pixels=None, metaworld="corner4"),
        f"{DMC}: camera_id 2 for quadruped, else 0",
        "Meta-World is not observed in images",
    ),
    "env.fixed_goal": Official(By(metaworld=False), f"{WORLD}: _freeze_rand_vec = False"),
    "env.obs.keep": Official(None, "none", SAME),
    "env.obs.image": Official(None, "none", SAME),
    "env.obs.vector": Official(None, "none", SAME),
    # ---- amount of training, and replay
    "training.total_steps": Official(10_000_000, "steps", "decisions, as here"),
    "training.batch_size": Official(256, "batch_size"),
    "training.sequence_length": Official(4, "horizon", "rows: one more than transitions"),
    "training.train_ratio": Official(
        None, "tdmpc2/trainer/online_trainer.py: num_updates", "null is one update per decision"
    ),
    "training.prefill": Official(1000, SEEDING, "max(1000, 5 episodes)"),
    "training.random_steps": Official(1000, SEEDING, "max(1000, 5 episodes)"),
    "training.seed_episodes": Official(5, SEEDING, "max(1000, 5 episodes)"),
    "training.prefill_counts": Official("steps", "trainer/online_trainer.py: seed_steps"),
    "training.count_resets": Official(False, "trainer/online_trainer.py: _step"),
    "training.pretrain": Official(True, "tdmpc2/trainer/online_trainer.py: num_updates"),
    "data.capacity": Official(1_000_000, "buffer_size"),
    "data.across_episodes": Official(False, "tdmpc2/common/buffer.py: traj_key, strict_length"),
    "data.draw_by": Official("episode", "common/buffer.py: SliceSampler", "torchrl 0.8.1"),
    "data.finished_episodes": Official(True, "trainer/online_trainer.py: buffer.add"),
    "data.online_queue": Official(False, "tdmpc2/common/buffer.py: SliceSampler"),
    "data.overlap": Official(False, "tdmpc2/trainer/online_trainer.py: one loop"),
    "evaluation.every": Official(50_000, "eval_freq"),
    "evaluation.episodes": Official(10, "eval_episodes"),
    "evaluation.episodes_during": Official(10, "eval_episodes"),
    "evaluation.deterministic": Official(True, "tdmpc2/trainer/online_trainer.py: eval_mode"),
    "evaluation.keep_best": Official(False, "save_agent: the last one"),
    # ---- optimiser
    "optimizer._target_": Official("worldloom.training.optimizers.Adam", "tdmpc2/tdmpc2.py: optim"),
    "optimizer.lr": Official(3e-4, "lr"),
    "training.learning_rate": Official(3e-4, "lr"),
    "optimizer.betas": Official([0.9, 0.999], "torch.optim.Adam"),
    "optimizer.eps": Official(1e-8, "torch.optim.Adam", "1e-5 for the policy, here by its group"),
    "optimizer.max_norm": Official(20.0, "grad_clip_norm"),
    "training.grad_clip": Official(None, "grad_clip_norm", "optimizer.max_norm does it"),
    "training.warmup": Official(1000, "none", "Adam has none; of optimizer=laprop"),
    "training.anneal": Official(0, "none", "Adam has none; of optimizer=laprop"),
    # ---- model
    "model._target_": Official("worldloom.models.tdmpc2.TDMPC2", "tdmpc2/tdmpc2.py"),
    "model.enc_dim": Official(256, "enc_dim"),
    "model.mlp_dim": Official(512, "mlp_dim"),
    "model.latent_dim": Official(512, "latent_dim"),
    "model.num_channels": Official(32, "num_channels"),
    "model.num_enc_layers": Official(2, "num_enc_layers"),
    "model.num_q": Official(5, "num_q"),
    "model.simnorm_dim": Official(8, "simnorm_dim"),
    "model.dropout": Official(0.01, "dropout"),
    "model.num_bins": Official(101, "num_bins"),
    "model.vmin": Official(-10.0, "vmin"),
    "model.vmax": Official(10.0, "vmax"),
    "model.log_std_min": Official(-10.0, "log_std_min"),
    "model.log_std_max": Official(2.0, "log_std_max"),
    "model.decoder": Official(False, "none"),
    "model.consistency_coef": Official(20.0, "consistency_coef"),
    "model.reward_coef": Official(0.1, "reward_coef"),
    "model.value_coef": Official(0.1, "value_coef"),
    "model.termination_coef": Official(1.0, "termination_coef"),
    "model.entropy_coef": Official(1e-4, "entropy_coef"),
    "model.rho": Official(_each(0.5, 0.5, 0.5, 0.7), f"rho; {MUJOCO}: cfg.rho"),
    "model.tau": Official(0.01, "tau"),
    "model.enc_lr_scale": Official(0.3, "enc_lr_scale"),
    "model.episode_length": Official(None, "tdmpc2/envs/__init__.py", "from env.time_limit"),
    "model.discount_denom": Official(5, "discount_denom"),
    "model.discount_min": Official(0.95, "discount_min"),
    "model.discount_max": Official(
        _each(0.995, 0.995, 0.995, 0.99), f"discount_max; {MUJOCO}: cfg.discount_max"
    ),
    "model.episodic": Official(
        None, "episodic: false", "the same until an episode terminates, as none of these does"
    ),
    "model.obs_order": Official(
        None, f"{DMC}: _obs_to_array", "null: the order in which dm_control lists observations"
    ),
    "model.task_dim": Official(
        None, "tdmpc2/common/parser.py: task_dim", "null: 0 for a single task"
    ),
    "model.action_dims": Official(None, "action_dims"),
    "model.episode_lengths": Official(None, "episode_lengths"),
    "model.mpc": Official(True, "mpc"),
    "model.horizon": Official(3, "horizon"),
    "model.iterations": Official(6, "iterations", "two more from 20 actions on, in both"),
    "model.num_samples": Official(512, "num_samples"),
    "model.num_elites": Official(64, "num_elites"),
    "model.num_pi_trajs": Official(24, "num_pi_trajs"),
    "model.min_std": Official(0.05, "min_std"),
    "model.max_std": Official(2.0, "max_std"),
    "model.temperature": Official(0.5, "temperature"),
}

# What R2-Dreamer's protocols set otherwise than DreamerV3's; all other settings are DreamerV3's, on
# purpose (docs/fidelity.md). The source is the README of the reference, section 6, and the
# repository's configs/*.yaml and runs/*.sh.
SIX = ("dmc_vision", "dmc_proprio", "metaworld", "atari100k", "crafter", "memory_maze")


def _six(*values: Any) -> By:
    """Return one value for each of SIX; None where the setting does not exist."""
    return By({k: v for k, v in zip(SIX, values, strict=True) if v is not ...})


def _sizes(small: Any, large: Any) -> By:
    """Return the values of size12m and of size200m."""
    return _six(small, small, small, large, large, small)


R2DREAMER = DREAMERV3 | {
    "env.num_envs": Official(_six(16, 16, 16, 1, 1, 16), "env.env_num"),
    "env._target_": Official(
        _six(
            *(
                f"worldloom.envs.suites.{suite}.make_env"
                for suite in ("dmc", "dmc", "metaworld", "atari", "crafter", "memory_maze")
            )
        ),
        "env.task",
    ),
    "env.task": Official(
        _six("walker-walk", "walker-walk", "assembly", ..., ..., "9x9"), "env.task"
    ),
    "env.game": Official(_six(..., ..., ..., "pong", ..., ...), "env.task"),
    "env.protocol": Official(_six(..., ..., ..., "atari100k", ..., ...), "env.task"),
    "env.fixed_goal": Official(_six(..., ..., False, ..., ..., ...), "envs/metaworld.py"),
    "env.action_repeat": Official(_six(2, 2, 2, 4, 1, 1), "env.action_repeat"),
    "env.time_limit": Official(
        _six(1000, 1000, 500, 108_000, 1000, 1000), "env.time_limit", "Memory Maze: that of 9x9"
    ),
    "env.pixels": Official(_six(True, False, True, True, True, True), "env.task"),
    "env.image_size": Official(_six(64, None, 64, 64, 64, None), "env.size", "null is 64"),
    "env.camera": Official(_six(None, None, "corner2", ..., ..., ...), "env.camera"),
    "training.total_steps": Official(
        _six(505_000, 255_000, 505_000, 102_500, 1_010_000, 50_050_000),
        "trainer.steps",
        "decisions here, there simulator steps: divided by the action repeat, of Memory Maze by 2",
    ),
    "training.train_ratio": Official(_six(512, 512, 512, 128, 512, 512), "trainer.train_ratio"),
    "evaluation.every": Official(10_000, "trainer.eval_every"),
    "evaluation.episodes": Official(_six(10, 10, 10, 100, 10, 10), "trainer.eval_episode_num"),
    "evaluation.deterministic": Official(True, "trainer.py: eval", "the mode of the policy"),
    "model.units": Official(_sizes(256, 1024), "model.units"),
    "model.depth": Official(_sizes(16, 64), "model.encoder.cnn.depth"),
    "model.deter": Official(_sizes(2048, 8192), "model.rssm.deter"),
    "model.hidden": Official(_sizes(256, 1024), "model.rssm.hidden"),
    "model.classes": Official(_sizes(16, 64), "model.rssm.discrete"),
    "model.representation.name": Official("r2dreamer", "model.rep_loss"),
    "model.representation.lambd": Official(5e-4, "model.r2dreamer.lambd"),
    "model.loss_scales.barlow": Official(0.05, "model.loss_scales.barlow"),
    "model.decoder": Official(False, "model.rep_loss", "no decoder"),
}
for key in [key for key in R2DREAMER if key.startswith("model.decoder.")]:
    del R2DREAMER[key]
del R2DREAMER["model.representation"]
TABLES = {"dreamerv3": DREAMERV3, "tdmpc2": TDMPC2, "r2dreamer": R2DREAMER}
