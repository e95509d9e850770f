"""Official DreamerV3 (danijar/dreamerv3, JAX): its own agent, built without an environment."""

import sys
from pathlib import Path

import numpy as np
from worker import Implementation, Job, is_image, serve


def build(job: Job) -> Implementation:
    sys.path.insert(0, job.folder)
    import jax

    jax.jit = positional_jit(jax.jit)
    from dreamerv3.agent import Agent
    from embodied.jax import internal

    agent = Agent(*spaces(job), agent_config(job))
    carry = agent.init_train(job.batch)
    data = internal.device_put(random_batch(agent, job), agent.train_sharded)
    seed = agent._seeds(0, agent.train_mirrored)

    def update():
        nonlocal carry
        carry, *_ = agent.train(carry, {**data, "seed": seed})
        # It hands out results one update late; these are the ones of this update.
        done = (agent.params, carry, agent.pending_sync, agent.pending_outs, agent.pending_mets)
        jax.block_until_ready(done)
        return np.asarray(agent.pending_mets["opt/loss"])

    def weights():
        sums = {}
        for key, value in agent.params.items():
            part = key.split("/")[0]
            if part in ("enc", "dyn", "dec", "rew", "con", "pol", "val", "slowval"):
                sums[part] = sums.get(part, 0.0) + float(np.abs(np.float64(value)).sum())
        return sums

    state = agent.init_policy(1)
    rng = np.random.default_rng(0)
    obs = {key: np.zeros((1, *s.shape), s.dtype) for key, s in agent.obs_space.items()}

    def policy():
        nonlocal state
        obs["obs"] = random_obs(rng, job, 1)
        state, action, _ = agent.policy(state, obs, mode="train")
        return action["action"]

    trained = ("enc", "dyn", "dec", "rew", "con", "pol", "val")
    parameters = sum(v.size for k, v in agent.params.items() if k.split("/")[0] in trained)
    facts = {"version": f"jax {jax.__version__}"}
    facts |= {"parameters": int(parameters), "devices": str(jax.devices())}
    return Implementation({"update": update, "policy": policy}, weights, facts)


def positional_jit(jit):
    """Take shardings by position, as jax did up to 0.4 and as the official code gives them."""
    names = ("in_shardings", "out_shardings", "static_argnums", "static_argnames", "donate_argnums")

    def call(fn, *given, **options):
        return jit(fn, **dict(zip(names, given, strict=False)), **options)

    return call


def spaces(job: Job):
    """Return what an environment with one observation and continuous actions would declare."""
    import elements

    if is_image(job.obs):
        obs = {"obs": elements.Space(np.uint8, (*job.obs[1:], job.obs[0]))}
    else:
        obs = {"obs": elements.Space(np.float32, (job.obs,))}
    obs["reward"] = elements.Space(np.float32)
    obs |= {f"is_{name}": elements.Space(bool) for name in ("first", "last", "terminal")}
    return obs, {"action": elements.Space(np.float32, (job.actions,), -1, 1)}


def random_obs(rng, job: Job, *lead):
    if is_image(job.obs):
        return rng.integers(0, 256, (*lead, *job.obs[1:], job.obs[0]), np.uint8)
    return rng.normal(size=(*lead, job.obs)).astype(np.float32)


def agent_config(job: Job):
    """Return the official settings of this size, on the CPU, reports off."""
    import elements
    import ruamel.yaml

    file = Path(job.folder) / "dreamerv3" / "configs.yaml"
    presets = ruamel.yaml.YAML(typ="safe").load(file.read_text())
    config = elements.Config(presets["defaults"]).update(presets[job.size])
    config = config.update({
        "batch_size": job.batch,
        "batch_length": job.length,
        "agent.imag_length": job.horizon,
        "agent.report": False,
        "jax.platform": "cpu",
        "jax.compute_dtype": "bfloat16" if job.precision == "bf16-mixed" else "float32",
        "jax.prealloc": False,
        "logdir": "/tmp/unused",
    })  # fmt: skip
    wanted = ("logdir", "seed", "jax", "batch_size", "batch_length", "replay_context")
    wanted = (*wanted, "report_length", "replica", "replicas")
    return elements.Config(
        **config.agent,
        **{key: getattr(config, key) for key in wanted if key != "jax"},
        jax={**config.jax, "profiler": False},
    )


def random_batch(agent, job: Job):
    """Draw B sequences of T + 1 rows (one of context) from the middle of episodes."""
    rng = np.random.default_rng(0)
    lead = (job.batch, job.length + agent.config.replay_context)
    data = {key: np.zeros((*lead, *s.shape), s.dtype) for key, s in agent.spaces.items()}
    data["obs"] = random_obs(rng, job, *lead)
    data["reward"] = rng.normal(size=lead).astype(np.float32)
    data["action"] = rng.uniform(-1, 1, data["action"].shape).astype(np.float32)
    return data


if __name__ == "__main__":
    serve(build)
