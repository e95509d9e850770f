"""The table's arithmetic and the count of operations; never how long anything takes."""

import sys
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

from worldloom.bench import BenchConfig, TrainedModel, count_flops, measure
from worldloom.bench.__main__ import main
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.nn.layers import BlockDense, BlockLinear, Conv, Dense
from worldloom.timing import phase

TINY = {
    "deter": 16,
    "hidden": 8,
    "stoch": 4,
    "classes": 4,
    "blocks": 2,
    "units": 8,
    "depth": 2,
    "imag_length": 2,
}
SMALL = {"batch": 2, "length": 3, "repeats": 2, "matrix": 64}


def run(monkeypatch, *words):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command sets it for the rest of its process
    try:
        main()
    finally:
        torch.set_num_threads(threads)


def words(**settings):
    return [f"{key}={value}" for key, value in settings.items()]


# ---- counting -----------------------------------------------------------------------------------


def train(layer: nn.Module, *inputs: torch.Tensor) -> int:
    """Operations of a forward and a backward pass that wants gradients of inputs and weights."""
    given = [x.requires_grad_() for x in inputs]
    return work_of(lambda: layer(*given).sum().backward())


def work_of(run) -> int:
    """Operations of a call."""

    def counted(read):
        run()
        return read()

    return count_flops(counted)


# A product [n, k] x [k, m] is n * m * k multiplications and as many additions. Backward does as
# much for the gradient of its input, and again for that of its weight.


def test_dense_by_hand():
    assert train(Dense(5, 7), torch.randn(3, 5)) == 3 * 2 * (3 * 5 * 7)
    assert train(Dense(5, 7), torch.randn(2, 3, 5)) == 3 * 2 * (2 * 3 * 5 * 7)


def test_no_gradient_of_the_input_is_not_counted():
    layer = Dense(5, 7)
    assert work_of(lambda: layer(torch.randn(3, 5)).sum().backward()) == 2 * 2 * (3 * 5 * 7)
    with torch.no_grad():
        assert work_of(lambda: layer(torch.randn(2, 3, 5))) == 2 * (2 * 3 * 5 * 7)


def test_counting_survives_views_of_weights_without_gradient():
    layer = BlockDense(8, 6, 20, 4)
    with torch.no_grad():
        kernels = layer.kernels()
        work = work_of(lambda: layer(torch.randn(4, 3, 2), torch.randn(3, 6), kernels))
    assert work == 2 * 4 * (3 * 2 * 5 + 3 * 6 * 5)


def test_block_linear_by_hand():
    # 4 blocks, each [3, 2] x [2, 5].
    assert train(BlockLinear(8, 20, 4), torch.randn(4, 3, 2)) == 3 * 2 * 4 * (3 * 2 * 5)


def test_block_dense_with_a_shared_input_by_hand():
    # 4 blocks, each [3, 2] x [2, 5] on its own input and [3, 6] x [6, 5] on the shared one.
    layer = BlockDense(8, 6, 20, 4)
    inputs = torch.randn(4, 3, 2, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    work = work_of(lambda: layer(*inputs, layer.kernels()).sum().backward())
    assert work == 3 * 2 * 4 * (3 * 2 * 5 + 3 * 6 * 5)


def test_convolution_by_hand():
    # Each of 2 * 4 * 6 outputs in 7 channels reads 3 x 3 x 5 inputs; padding is counted as data.
    work = train(Conv(5, 7, 3), torch.randn(2, 4, 6, 5))
    assert work == 3 * 2 * (2 * 4 * 6) * 7 * (3 * 3 * 5)


def test_work_is_linear_in_the_batch():
    small, large = (measure(BenchConfig(**SMALL | {"batch": n}), **TINY).flops for n in (1, 3))
    assert large == {name: 3 * work for name, work in small.items()}
    assert small["update"] == sum(work for name, work in small.items() if name != "update")
    assert small["  backward"] > 0 == small["  optimizer"]


# ---- measuring ----------------------------------------------------------------------------------


ALWAYS = ["  loss", "  backward", "  optimizer"]  # and what a model marks
BESIDE = ["collect", "sample", "log", "policy, 1 env", "policy, 16 envs"]


def parts(names):
    return [name for name in names if name.startswith("  ")]


def test_share_is_floor_by_median():
    config = BenchConfig(**SMALL)
    result = measure(config, **TINY)
    seconds = result.seconds
    assert list(seconds) == ["update", *parts(seconds), *BESIDE]
    assert set(ALWAYS) <= set(parts(seconds)) and parts(seconds) == parts(result.flops)
    assert [len(times) for times in seconds.values()] == [2] * len(seconds)
    assert len(result.rates) == 6
    for whole, *each in zip(*(seconds[name] for name in ["update", *parts(seconds)]), strict=True):
        assert whole == pytest.approx(sum(each))
        assert min(each) > 0
    assert result.floor == result.flops["update"] / median(result.rates)
    assert result.share == result.floor / median(seconds["update"])
    assert 5e7 < result.peak_bytes < 1e12  # torch alone takes more than 50 MB


def test_phases_that_a_model_marks_have_a_line_of_their_own(monkeypatch):
    compute_loss = DreamerV3.compute_loss

    def marked(self, batch):
        with phase("heads_of_mine"):
            torch.mm(torch.ones(2, 3), torch.ones(3, 5))
        return compute_loss(self, batch)

    monkeypatch.setattr(DreamerV3, "compute_loss", marked)
    result = measure(BenchConfig(**SMALL), **TINY)
    assert result.flops["  heads_of_mine"] == 2 * 2 * 3 * 5
    assert "\n  heads of mine " in result.table()


def test_a_run_collects_what_its_train_ratio_owes():
    # Batches of 16 x 64 steps, each of which is replayed 32 times; one update per decision.
    assert (
        BenchConfig().decisions_per_update == 32 and BenchConfig(batch=8).decisions_per_update == 16
    )
    assert BenchConfig(model="tdmpc2:1m").decisions_per_update == 1
    seconds = measure(BenchConfig(**SMALL), **TINY).seconds
    assert seconds["collect"] == [2 * 3 / 32 * each for each in seconds["policy, 1 env"]]


@pytest.mark.parametrize("context", [True, False])
def test_batch_has_context_where_the_model_keeps_latents(context):
    config = BenchConfig(batch=2, length=3, obs=5, actions="3,4", discrete=True)
    trained = TrainedModel(config, replay_context=context, **TINY)
    batch, model = trained.random_batch(config), trained.model
    assert batch["obs"].shape == (2, 3 + context, 5)
    assert batch["actions"].shape == (2, 3 + context, 7)
    assert batch["actions"].sum(-1).unique().tolist() == [2]
    assert ("context" in batch) == context
    result = model.compute_loss(batch)
    assert ("replay" in result) == context
    if context:
        assert result["replay"]["deter"].shape == (2, 3, 16)


def test_a_preset_brings_its_batch_and_its_optimiser():
    assert (BenchConfig().batch, BenchConfig().length) == (16, 64)
    config = BenchConfig(model="tdmpc2:1m")
    assert (config.batch, config.length) == (256, 4)
    assert BenchConfig(model="tdmpc2:1m", batch=3).batch == 3
    tiny = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 16, "num_samples": 8, "num_elites": 2}
    config = BenchConfig(model="tdmpc2:1m", repeats=2, matrix=64, envs=3)
    result = measure(config, num_pi_trajs=2, **tiny)
    assert list(result.seconds)[-2:] == ["policy, 1 env", "policy, 3 envs"]
    # Twelve times the rows of 21 transitions and states: all its work is in them.
    small = measure(replace(config, batch=21), num_pi_trajs=2, **tiny)
    large = measure(replace(config, batch=252), num_pi_trajs=2, **tiny)
    assert large.flops["update"] == 12 * small.flops["update"] < result.flops["update"]


def test_a_model_that_cannot_act_is_measured_without():
    result = measure(BenchConfig(**SMALL), actor_critic=False, **TINY)
    assert list(result.seconds) == ["update", *parts(result.seconds), "sample", "log"]


def test_precision_is_that_of_updates_and_plans():
    tiny = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 16, "num_samples": 8, "num_elites": 2}
    tiny |= {"num_pi_trajs": 2, "iterations": 1}
    with pytest.raises(ValueError, match="precision is '16'; expected 32-true or bf16-mixed"):
        BenchConfig(precision="16")
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        config = BenchConfig(model="tdmpc2:1m", batch=3, precision=precision)
        trained, seen = TrainedModel(config, **tiny), set()
        trained.model.reward.register_forward_hook(lambda *call, seen=seen: seen.add(call[2].dtype))
        trained.update(trained.random_batch(config))
        assert seen == {dtype}
        seen.clear()
        trained.act(config, 2, 1)
        # The reward of the last action, which `observe` computes, is not part of the plan.
        assert seen == {dtype, torch.float32}


def test_images():
    result = measure(BenchConfig(**SMALL | {"obs": "3,16,16", "repeats": 1}), **TINY)
    vectors = measure(BenchConfig(**SMALL | {"repeats": 1}), **TINY)
    assert result.flops["update"] > vectors.flops["update"]


# ---- the command --------------------------------------------------------------------------------


def test_table_is_consistent(monkeypatch, capsys):
    own = {f"model.{key}": value for key, value in TINY.items()}
    run(monkeypatch, *words(**SMALL, obs=5, threads=1), *words(**own))
    settings, products, head, *lines = capsys.readouterr().out.splitlines()
    assert products.startswith(("float32 products by torch (", "float32 products by onednn ("))
    assert settings.startswith("model=dreamerv3:size1m batch=2 length=3 obs=(5,) actions=6 ")
    assert settings.endswith(" model.imag_length=2")
    assert " threads=1 " in settings
    assert head.split() == ["median", "min", "max", "GFLOP"]
    table = {}
    for line in lines:
        numbers = [float(x.replace(",", "")) for x in line[32:].split()]
        table[line[:24].rstrip()] = (line[24:32].strip(), numbers)
    names = [name for name in table if name in ALWAYS or not name.startswith("  ")]
    assert {name: (table[name][0], len(table[name][1])) for name in names} == {
        **{name: ("ms", 4) for name in ["update", *ALWAYS]},
        **{name: ("ms", 3) for name in BESIDE},
        "matrix product": ("GFLOP/s", 3),
        "floor = work / rate": ("ms", 1),
        "share = floor / update": ("%", 1),
        "peak memory": ("MB", 1),
    }
    for _, numbers in table.values():
        if len(numbers) >= 3:
            assert numbers[1] <= numbers[0] <= numbers[2]
    first = {name: numbers[0] for name, (_, numbers) in table.items()}
    # Three digits after the point: each number may be half of the last one off.
    half = 0.0005
    rate, floor = first["matrix product"], first["floor = work / rate"]
    assert abs(floor * rate / 1e3 - table["update"][1][3]) <= (
        half * (1 + (floor + rate + 1) / 1e3)
    )
    share, update = first["share = floor / update"], first["update"]
    assert abs(share * update / 1e2 - floor) <= half * (1 + (share + update + 1) / 1e2)


def test_help(monkeypatch, capsys):
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, "--help")
    assert not done.value.code
    out = capsys.readouterr().out
    assert all(f"[{name}=" in out for name in vars(BenchConfig()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["lenght=8"], "unknown key 'lenght' (did you mean 'length'?)"),
        (["batch=many"], "batch is 'many'; expected a whole number"),
        (["batch=0"], "batch is 0; expected whole numbers of at least 1"),
        (["obs=3,-64,64"], "obs is '3,-64,64'; expected whole numbers of at least 1"),
        (["actions=six"], "actions is 'six'; expected whole numbers"),
        (["obs=3,17,17"], "17"),
        (["model=dreamerv3:size2m"], "unknown model 'dreamerv3:size2m' (did you mean"),
        (["model.detter=8"], "no hyperparameter 'detter' (did you mean 'deter'?)"),
        (["device=tpu"], "device is 'tpu'"),
    ],
)
def test_mistakes_end_with_one_line(monkeypatch, capsys, given, message):
    with pytest.raises(SystemExit) as done:
        run(monkeypatch, *given)
    assert done.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
