"""Several tasks behind one pair of spaces: padding, masks, limits, and what is rejected."""

import functools

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.app.task import Task, env_maker
from worldloom.app.tasks import TASK_SETS, count_tasks, expand_tasks, require_same_tasks
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.multitask import TaskSet, make_env
from worldloom.envs.vector import RowStream, make_vector_env
from worldloom.envs.wrappers import wrap


class Echo(gym.Env):
    """Observes its last action and its steps; its actions are in [0, `high`]."""

    def __init__(self, actions=1, high=4.0, image=None, discrete=False):
        box = spaces.Box(0.0, high, (actions,), np.float32)
        self.action_space = spaces.Discrete(3) if discrete else box
        parts = {"zeta": spaces.Box(-9, 9, (1,), np.float32), "act": spaces.Box(-9, 9, (actions,))}
        if image:
            parts["eye"] = spaces.Box(0, 255, (image, image, 3), np.uint8)
        self.observation_space, self.image = spaces.Dict(parts), image
        self.obs_order = ("zeta", "act")

    def obs(self, action):
        obs = {"act": np.float32(action), "zeta": np.float32([self.steps])}
        if self.image:
            obs["eye"] = np.full((self.image, self.image, 3), self.steps, np.uint8)
        return obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.obs(np.zeros(self.action_space.shape)), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self.obs(action), float(action.sum()), False, False, {}


def make(limit=None, repeat=1, **kwargs):
    return wrap(Echo(**kwargs), limit, repeat)


def two(**other):
    one = functools.partial(make, 4, actions=1)
    return TaskSet({"one": one, "two": functools.partial(make, 12, 3, actions=2, **other)})


def test_vectors_are_padded_in_the_environments_order_and_actions_are_scaled_and_cut():
    tasks = two()
    assert [(i.width, i.actions, i.episode_length, i.frames_per_step) for i in tasks.infos] == [
        (2, 1, 4, 1),
        (3, 2, 4, 3),
    ]
    for number, name in enumerate(("one", "two")):
        env = tasks(name)
        obs, _ = env.reset(seed=0)
        assert env.observation_space.contains(obs) and obs["task"] == number
        obs, reward, *_ = env.step(np.array([0.5, -1.0], np.float32))
        # 0.5 of [-1, 1] is 3 of [0, 4]; the steps come first, as in obs_order.
        wanted = [[1, 3, 0], [3, 3, 0]][number]
        assert obs["obs"].tolist() == wanted and reward == [3, 9][number]
    assert tasks.action_masks([1, 0]).tolist() == [[1, 1], [1, 0]]
    assert make_env({"a": make, "b": make}, "b").reset()[0]["task"] == 1


def test_each_environment_keeps_its_task_limit_and_repeat():
    tasks = two()
    envs = make_vector_env([tasks.maker(i % 2) for i in range(4)], 4)
    obs, actions = envs.single_observation_space, envs.single_action_space
    rows = RowStream(envs, ObsSpec.from_space(obs), ActionSpec.from_space(actions))
    rows.reset(0)
    assert rows.obs["task"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]
    for _ in range(4):
        assert not rows.is_last.any()
        ended = rows.step(np.zeros((4, 2), np.float32))
    assert [index for index, _ in ended] == [0, 1, 2, 3]
    assert [episode["return"] for _, episode in ended] == [8, 48, 8, 48]
    rows.step(np.zeros((4, 2), np.float32))
    assert rows.is_first.all() and rows.obs["task"].argmax(1).tolist() == [0, 1, 0, 1]
    envs.close()


def test_images_keep_their_shape_and_must_be_the_same():
    image = functools.partial(make, image=16)
    env = TaskSet({"a": image, "b": functools.partial(make, image=16, actions=2)})("b")
    obs, _ = env.reset(seed=0)
    assert obs["image/eye"].shape == (3, 16, 16) and obs["obs"].shape == (3,)
    with pytest.raises(ValueError, match=r"tasks: a observes 2 numbers, but b image/eye \(3, "):
        TaskSet({"a": make, "b": image})()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": make}, "env.tasks has 1 task; expected at least two"),
        ({"a": make, "b": functools.partial(make, discrete=True)}, "env.tasks: b: its actions are"),
    ],
)
def test_tasks_that_cannot_be_joined_are_rejected(tasks, message):
    with pytest.raises(ValueError, match=message):
        TaskSet(tasks)()


def test_an_unknown_task_is_named_with_a_similar_one():
    with pytest.raises(ValueError, match=r"there is no task 'tow' among env.tasks .*'two'"):
        two()("tow")


# Names and sections -------------------------------------------------------------------------------

SECTION = {"_target_": "worldloom.envs.suites.multitask.make_env"}
SHORT = {"env": "gymnasium", "id": "Pendulum-v1", "time_limit": 50, "action_repeat": 2}


def section(*tasks, **settings):
    return {**SECTION, "tasks": list(tasks), "num_envs": len(tasks), "workers": 0} | settings


def test_names_select_a_suite_and_settings_are_those_of_the_task_or_of_all():
    names = ["walker-walk", "mw-reach", "dmc/cup-catch", "Pendulum-v1", {**SHORT, "name": "short"}]
    walker, reach, cup, plain, short = expand_tasks(section(*names, time_limit=70))
    assert [x.name for x in (walker, reach, cup)] == ["walker-walk", "mw-reach", "cup-catch"]
    targets = [x.env["_target_"].split(".")[-2] for x in (walker, reach, cup, plain, short)]
    assert targets == ["dmc", "metaworld", "dmc", "gymnasium", "gymnasium"]
    assert [x.env["action_repeat"] for x in (walker, reach, plain, short)] == [2, 2, 1, 2]
    assert [x.env["time_limit"] for x in (walker, plain, short)] == [70, 70, 50]
    # The official scores: return / 10 and the percentage of successes.
    assert walker.normalize({"return": 870.0}) == 87.0
    assert reach.normalize({"return": 870.0, "success": 0.5}) == 50.0
    assert plain.normalize({"return": -100.0}) is None
    (scaled, _) = expand_tasks(section({**SHORT, "score": [-1000, 0]}, "walker-walk"))
    assert scaled.normalize({"return": -250.0}) == 75.0
    assert len(TASK_SETS["mt30"]) == count_tasks("mt30") == 30
    assert len({*TASK_SETS["mt80"]}) == count_tasks(["mt80"]) == 80


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["Pendulum-v1"], "env.tasks has 1 task; expected at least two"),
        ([], "env.tasks has 0 task"),
        (["Pendulum-v1", "Pendulum-v1"], "env.tasks has Pendulum-v1 twice; .* name: other"),
        (["Pendulum-v1", 3], "env.tasks has 3; expected a name such as dmc/walker-walk"),
        ([{**SHORT, "num_envs": 3}, "a"], "has num_envs, which all tasks share; set env.num_envs"),
        (5, "env.tasks has 5; expected a name"),
        (["Pendulum-v1", {"env": "dmx", "task": "a"}], "has the environment 'dmx' .*'dmc'"),
        (["Pendulum-v1", "Pendulum-v9"], "env.tasks: Pendulum-v9: There is no environment"),
        (["Pendulum-v1", "CartPole-v1"], "env.tasks: CartPole-v1: its actions are Discrete"),
        (["Pendulum-v1", {**SHORT, "name": "b", "score": [1]}], r"b has the score \[1\]; expected"),
        (["Pendulum-v1", {**SHORT, "time_limit": 0}], "Pendulum-v1 twice"),
        (
            ["Pendulum-v1", {**SHORT, "name": "b", "frame_stack": "x"}],
            "env.tasks: b: .*frame_stack",
        ),
    ],
)
def test_wrong_tasks_are_one_line(tasks, message):
    with pytest.raises(ValueError, match=message) as raised:
        Task.from_config({**section(num_envs=2), "tasks": tasks})
    assert "\n" not in str(raised.value)


def test_an_unknown_task_of_a_suite_is_named():
    pytest.importorskip("dm_control")
    with pytest.raises(ValueError, match=r"env.tasks: walker-wlak: env.tasks is 'walker-wl"):
        Task.from_config(section("Pendulum-v1", "walker-wlak"))


def test_every_task_has_as_many_environments():
    tasks = ["Pendulum-v1", {**SHORT, "name": "short"}]
    with pytest.raises(ValueError, match=r"env.num_envs is 3, but there are 2 tasks; .* 2 or 4"):
        Task.from_config(section(*tasks, num_envs=3))
    task = Task.from_config(section(*tasks, num_envs=4))
    assert task.find_tasks(2, 4) == [0, 1, 0, 1] and task.episode_length == 200
    found = task.collecting()
    assert found["frames_per_step"] == [1, 2, 1, 2]
    assert found["names"] == ["Pendulum-v1", "short"] * 2


def test_a_model_acts_in_the_tasks_of_its_training_only():
    trained = section("Pendulum-v1", {**SHORT, "name": "short"})
    require_same_tasks("run", trained, {**trained, "num_envs": 8})
    require_same_tasks("run", {"_target_": "other"}, trained)
    for other in (section(*reversed(trained["tasks"])), {"_target_": "other"}):
        with pytest.raises(ValueError, match="run was trained on the tasks Pendulum-v1, short, "):
            require_same_tasks("run", trained, other)


def test_official_tasks_have_the_official_order_of_observations():
    pytest.importorskip("dm_control")
    from dm_control import suite

    env = env_maker(section("walker-walk", "pendulum-swingup"))("walker-walk")
    obs, _ = env.reset(seed=5)
    simulator = suite.load("walker", "walk")
    simulator.task.random.seed(5)
    first = simulator.reset().observation
    wanted = np.concatenate([np.ravel(value) for value in first.values()], dtype=np.float32)
    np.testing.assert_allclose(obs["obs"], wanted, rtol=1e-6)
