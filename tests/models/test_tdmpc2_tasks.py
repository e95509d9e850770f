"""Several tasks in one TD-MPC2: how they are named, masked, embedded and discounted."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.test_tdmpc2_parts import B, T, assert_same, batch_for, build, create, losses_of
from worldloom import check_world_model
from worldloom.protocol import LatentState

TASKS = dict(action_dims=[3, 1, 2], task_dim=4)
NAMED = {"obs": (4,), "task": (3,)}
IDS = torch.tensor([2, 0, 1])


def test_all_ways_to_name_the_tasks_agree():
    bare, named = build((4,), 3, **TASKS), build(NAMED, 3, **TASKS)
    batch = batch_for(bare)
    steps = IDS[:, None].expand(B, T)
    one_hot = F.one_hot(steps, 3).float()
    wanted = losses_of(bare, {**batch, "task": IDS})
    other = losses_of(bare, {**batch, "task": IDS.flip(0)})
    assert wanted[0]["loss"] != other[0]["loss"]
    found = [losses_of(bare, {**batch, "task": steps})]
    found += [
        losses_of(named, {**batch, "obs": {"obs": batch["obs"], "task": task}})
        for task in (steps, one_hot)
    ]
    found += [losses_of(named, {**batch, "obs": {"obs": batch["obs"]}, "task": IDS})]
    for each in found:
        for mine, theirs in zip(wanted, each, strict=True):
            assert_same(mine, theirs)

    obs = batch["obs"][:, 0]
    state = bare.encode(obs, task=IDS)
    assert torch.equal(state.extras["task"], IDS)
    for again in (
        bare.encode(obs, task=one_hot[:, 0]),
        named.encode({"obs": obs, "task": IDS}),
        named.encode({"obs": obs, "task": one_hot[:, 0]}),
        named.encode({"obs": obs}, task=IDS),
    ):
        assert torch.equal(again.features, state.features)
        assert torch.equal(again.extras["task"], IDS)
    assert torch.equal(bare.encode(obs, 2).extras["task"], torch.full((B,), 2))


def test_the_task_stays_in_the_state():
    model = build((4,), 3, **TASKS)
    obs, action = torch.randn(2, B, 4), torch.rand(B, 3)
    state = model.encode(obs[0], IDS)
    seen = model.observe(state, action, obs[1])
    assert torch.equal(seen.features, model.encode(obs[1], IDS).features)
    for later in (seen, model.predict(state, action), model.policy(seen)[1]):
        assert torch.equal(later.extras["task"], IDS)
    trajectory = model.imagine(state, torch.rand(T, B, 3))
    assert torch.equal(trajectory.states[-1].extras["task"], IDS)
    mixed = LatentState.where(torch.tensor([True, False, False]), model.encode(obs[1], 1), seen)
    assert mixed.extras["task"].tolist() == [1, 0, 1]


@pytest.mark.filterwarnings("ignore:a batch contains terminations")
def test_tasks_among_the_observations_keep_the_protocol():
    check_world_model(build(NAMED, 3, decoder=True, **TASKS))


def test_each_task_has_the_discount_of_its_episodes():
    model = build((4,), 3, **TASKS, episode_lengths=[50, 500, None])
    model.estimate_values = lambda z, action, task, target: torch.full((2, 2, B), 10.0)
    # 1 - 5 / 50 is below the least, 1 - 5 / 500 between both, and without an end it is the most.
    target = model.compute_td_target(torch.rand(2, B, 16), torch.ones(2, B), torch.zeros(2, B), IDS)
    torch.testing.assert_close(target, torch.tensor([[10.95, 10.5, 10.9]] * 2))


def test_long_embeddings_are_cut_where_they_are_used():
    model = build((4,), 3, **TASKS)
    rows = torch.tensor([[3.0, 0, 4, 0], [0, 2, 0, 0], [0.5, 0, 0, 0]])
    with torch.no_grad():
        model.tasks.embedding.weight.copy_(rows)
    model.encode(torch.randn(B, 4), torch.tensor([0, 2, 0]))
    cut = torch.stack([rows[0] / (5 + 1e-7), rows[1], rows[2]])
    torch.testing.assert_close(model.tasks.embedding.weight.detach(), cut)
    assert torch.equal(model.tasks.embedding.weight[1:], rows[1:])


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (None, r"the task is missing, and the model has 3; pass task ids \[B\] from 0 to 2"),
        (torch.tensor([0, 1]), r"the task ids have shape \(2,\); expected \[3\]"),
        (torch.tensor([0, 1, 3]), r"the task ids are \[0, 1, 3\]; expected integers from 0 to 2"),
        (torch.tensor([0, -1, 1]), r"the task ids are \[0, -1, 1\]; expected integers from 0 to 2"),
        (torch.eye(3)[:, :2], r"shape \(3, 2\); expected \[3\]"),
    ],
)
def test_tasks_that_do_not_exist_are_refused(task, message):
    model = build((4,), 3, **TASKS)
    with pytest.raises(ValueError, match=message):
        model.encode(torch.zeros(B, 4), task)
    batch = batch_for(model)
    with pytest.raises(ValueError, match=message):
        model.compute_loss(batch if task is None else {**batch, "task": task})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(action_dims=[3, 4]), r"action_dims is \[3, 4\], but action_dim is 3; .* from 1 to 3"),
        (dict(action_dims=[0, 3]), r"action_dims is \[0, 3\], but action_dim is 3"),
        (dict(task_dim=0), "task_dim is 0; expected at least 1 for 3 tasks"),
        (dict(episode_lengths=[9, 9]), "episode_lengths has 2 entries and action_dims 3"),
        (dict(episode_lengths=[9, 9, 0]), "episode_length is 0; expected at least 1"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create((4,), 3, **(TASKS | options))


def test_as_many_tasks_as_steps_are_not_mixed_up():
    """One-hot tasks [B, 4] have the shape of ids [B, T] where T is 4."""
    model = build((4,), 2, action_dims=[1, 2, 2, 1], task_dim=3)
    ids = torch.tensor([3, 0, 2])
    batch = batch_for(model, length=4)
    wanted = losses_of(model, {**batch, "task": ids})
    for task in (F.one_hot(ids, 4).float(), ids[:, None].expand(B, 4)):
        for mine, theirs in zip(wanted, losses_of(model, {**batch, "task": task}), strict=True):
            assert_same(mine, theirs)


def test_a_task_may_come_as_a_box_of_one_number():
    named = build({"obs": (4,), "task": (1,)}, 3, **TASKS)
    obs = {"obs": torch.randn(B, 4), "task": IDS[:, None].float()}
    assert torch.equal(named.encode(obs).extras["task"], IDS)
