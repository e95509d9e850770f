"""The contents of a page against independent plays and rollouts of the model."""

import numpy as np
import pytest
import torch

import worldloom
from tests.view.conftest import BALL, DRIFT, TDMPC2
from tests.view.scenes import HOSTILE, paint
from worldloom.view import playback
from worldloom.view.imagination import Dreamer

ALLOW = ("scenes.Ball", "scenes.Drift", "scenes.Silent")
SEED = 1_000_003  # of evaluations
SMALL_CARTPOLE = ("env=gymnasium", "env.id=CartPole-v1", "model=dreamerv3_tiny", "threads=1")
SMALL_CARTPOLE += ("model.units=8", "model.deter=16", "model.hidden=8")


def play(folder, episodes, allow=ALLOW):
    """Play episodes with the agent of a run: observations, actions, rewards of each."""
    run = worldloom.load_run(folder, allow=allow)
    env, agent = run.make_env(), run.agent(seed=SEED)
    played = []
    for number in range(episodes):
        obs, _ = env.reset(seed=SEED if number == 0 else None)
        seen, actions, rewards, first, ended = [obs], [], [0.0], True, False
        while not ended:
            actions.append(agent.act(seen[-1], is_first=first))
            obs, reward, terminated, truncated, _ = env.step(actions[-1])
            seen, rewards = [*seen, obs], [*rewards, reward]
            first, ended = False, terminated or truncated
        played.append((seen, actions, rewards))
    return run, played


def test_the_episodes_and_the_imagination_of_tdmpc2(make_run, view):
    """Its latents and predictions are deterministic, so every number can be computed again."""
    folder = make_run(*BALL, *TDMPC2)
    page = view(folder, BALL[0], horizon=4, every=3, episodes=2)
    run, played = play(folder, 2)
    for episode, (seen, actions, rewards) in zip(page.episodes, played, strict=True):
        assert episode["length"] == 12 and episode["ended"] == "truncated"
        (obs,) = episode["obs"]
        np.testing.assert_allclose(obs["true"], seen, atol=1e-4)
        np.testing.assert_allclose(2 * episode["actions"]["values"], actions, atol=1e-4)
        np.testing.assert_allclose(episode["rewards"], rewards, atol=1e-4)
        assert episode["return"] == pytest.approx(sum(rewards), abs=1e-3)
        states = follow(run.model, seen, actions)
        (latents,) = episode["latents"]
        codes = torch.cat([state.deterministic for state in states]).numpy()
        np.testing.assert_allclose(latents["values"], codes, atol=3e-3)
        check_imagination(run.model, episode, states, np.array(seen), np.array(actions) / 2)


def follow(model, seen, actions):
    """Observe an episode with a model, step by step."""
    with torch.no_grad():
        states = [model.encode(torch.tensor(seen[0])[None])]
        for obs, action in zip(seen[1:], actions, strict=True):
            action = torch.tensor(action)[None] / 2
            states.append(model.observe(states[-1], action, torch.tensor(obs)[None]))
    return states


def check_imagination(model, episode, states, seen, actions):
    """Compare what is imagined from every third row with calls of `predict` and `decode`."""
    imagined, obs = episode["imagined"], episode["obs"][0]
    assert imagined["every"] == 3 and imagined["horizon"] == 4
    assert imagined["rewards"].shape == (4, 5) and obs["imagined"].shape == (4, 5, 2)
    for index, start in enumerate(range(0, 12, 3)):
        state = states[start]
        for h in range(5):
            numbers = [imagined[name][index, h] for name in ("rewards", "continues", "stateErrors")]
            if start + h > 12:
                assert np.isnan([*numbers, obs["error"][index, h]]).all()
                assert np.isnan(obs["imagined"][index, h]).all()
                continue
            with torch.no_grad():
                if h:
                    action = torch.tensor(actions[start + h - 1], dtype=torch.float32)[None]
                    state = model.predict(state, action)
                decoded = model.decode(state)
            guess = decoded["obs"][0].numpy()
            after = states[start + h].features
            distance = (state.features - after).norm() / after.norm()
            wanted = [float(decoded["reward"]), float(decoded["continue"]), float(distance)]
            np.testing.assert_allclose(numbers, wanted, atol=1e-3)
            np.testing.assert_allclose(obs["imagined"][index, h], guess, atol=1e-3)
            error = np.sqrt(np.square(guess - seen[start + h]).mean())
            assert obs["error"][index, h] == pytest.approx(error, abs=1e-3)


def test_the_plans_of_tdmpc2_belong_to_the_actions(make_run, view):
    folder = make_run(*BALL, *TDMPC2)
    for episode in view(folder, BALL[0], horizon=2).episodes:
        plan, actions = episode["plan"], episode["actions"]["values"]
        assert plan["mean"].shape == plan["std"].shape == (12, 3, 1)
        assert plan["elites"].shape == (12, 8, 3, 1)
        np.testing.assert_allclose(plan["weights"].sum(1), 1, atol=0.05)
        # The action is the first one of a sequence, and the mean is the weighted one.
        nearest = np.abs(plan["elites"][:, :, 0] - actions[:, None]).min((1, 2))
        assert nearest.max() < 0.01
        mean = (plan["weights"][:, :, None, None] * plan["elites"]).sum(1)
        np.testing.assert_allclose(plan["mean"], mean, atol=0.05)


def test_a_custom_model_with_a_known_error(make_run, view):
    """`Drift` is wrong by 0.01 per step: errors, values and rewards can be told in advance."""
    words = [*BALL, *DRIFT, "+model.drift=0.01", "+env.names=[position, triple]"]
    folder = make_run(*words, "+env.terminates=true")
    page = view(folder, *words[:1], *DRIFT[1:], horizon=5, episodes=1)
    (episode,) = page.episodes
    imagined, (obs,) = episode["imagined"], episode["obs"]
    assert obs["names"] == ["position", "triple"] and episode["ended"] == "terminated"
    assert imagined["every"] == 1 and imagined["rewards"].shape == (12, 6)
    drift = 0.01 * np.arange(6)
    for start in range(12):
        count = min(6, 13 - start)
        position = obs["true"][start : start + count, 0] + drift[:count]
        np.testing.assert_allclose(imagined["rewards"][start, :count], position, atol=1e-4)
        np.testing.assert_allclose(imagined["values"][start, :count], 10 * position, atol=1e-3)
        error = np.sqrt((1 + 9) / 2) * drift[:count]
        np.testing.assert_allclose(obs["error"][start, :count], error, atol=1e-4)
        assert np.isnan(imagined["rewards"][start, count:]).all()
        np.testing.assert_allclose(imagined["continues"][start, :count], 0.75)
    np.testing.assert_allclose(episode["values"], 10 * obs["true"][:, 0], atol=1e-3)
    rewards = episode["rewards"][1:]
    wanted = [np.sum(rewards[row:] * 0.9 ** np.arange(12 - row)) for row in range(13)]
    np.testing.assert_allclose(episode["returns"], wanted, atol=1e-3)
    inferred = 0.5 + obs["true"][1:, 0]
    guess = inferred + 0.01
    wanted = inferred * np.log(inferred / guess) + (1 - inferred) * np.log(
        (1 - inferred) / (1 - guess)
    )
    assert np.isnan(episode["surprise"][0])
    np.testing.assert_allclose(episode["surprise"][1:], wanted, atol=1e-5)
    assert page.episodes[0]["plan"] is None and page.notes == []
    assert ["final return", "3.00 ± 0.50"] in page.run["facts"]
    assert ["model._target_", "scenes.Drift"] in page.run["config"]
    (curve,) = page.run["curves"]
    assert curve["points"] == [[step, step / 2] for step in range(10, 60, 10)]


def test_a_model_that_only_implements_the_protocol(make_run, view):
    """Without a policy it plans; without predicted observations the latent error remains."""
    words = ["+planner.num_samples=32", "+planner.num_elites=8", "+planner.horizon=3"]
    target = "model._target_=scenes.Silent"
    folder = make_run(*BALL, "model=custom", target, "+model.drift=0.02", *words)
    page = view(folder, BALL[0], target, horizon=3, episodes=1)
    (episode,) = page.episodes
    (obs,) = episode["obs"]
    assert obs["imagined"] is None and obs["error"] is None
    assert episode["values"] is None and episode["imagined"]["values"] is None
    assert episode["returns"] is None and episode["surprise"] is None
    assert episode["plan"]["elites"].shape == (12, 8, 3, 1)
    assert np.nanmax(episode["imagined"]["stateErrors"][:, 3]) > 0.05
    # It plans towards the largest position, which is what it is rewarded for.
    assert episode["plan"]["mean"][0, 0, 0] > 0.5 and obs["true"][-1, 0] > 0.4
    assert page.notes == []


def test_a_policy_that_adds_to_the_state(make_run, view):
    target = "model._target_=scenes.Planned"
    page = view(make_run(*BALL, "model=custom", target), BALL[0], target, horizon=2, episodes=1)
    obs = page.episodes[0]["obs"][0]
    np.testing.assert_allclose(obs["imagined"][0], obs["true"][:3], atol=1e-4)


def test_a_decoder_that_fails_is_named_once(make_run, view):
    folder = make_run(*BALL, *DRIFT, "+model.fails=true")
    page = view(folder, BALL[0], DRIFT[1], horizon=3)
    assert page.notes == [
        "Drift.decode raised RuntimeError, so its predictions are missing: no decoder"
    ]
    assert page.printed.startswith(page.notes[0])
    imagined = page.episodes[0]["imagined"]
    assert (
        np.isnan(imagined["rewards"][:, 0]).all() and np.isfinite(imagined["rewards"][0, 1:]).all()
    )


def test_dicts_with_images(make_run, view):
    folder = make_run(*BALL, *DRIFT, "+env.sees=dict", "+env.length=6")
    page = view(folder, BALL[0], DRIFT[1], horizon=2, episodes=1)
    obs = {part["key"]: part for part in page.episodes[0]["obs"]}
    assert obs.keys() == {HOSTILE, "camera"}
    for row, position in enumerate(obs[HOSTILE]["true"][:, 0]):
        image = paint(position).astype(int)
        assert abs(obs["camera"]["true"][row] - image).mean() < 8
        if row < 6:
            assert abs(obs["camera"]["imagined"][3 * row] - image).mean() < 10
    assert obs["camera"]["error"][0, 0] < 3


def test_an_episode_is_cut_off_after_max_steps(make_run, view):
    folder = make_run(*BALL, *DRIFT)
    page = view(folder, BALL[0], DRIFT[1], max_steps=5, horizon=2, episodes=2)
    assert [(e["length"], e["ended"]) for e in page.episodes] == [(5, "cut off")] * 2
    # The value of the last row stands for what follows.
    first = page.episodes[0]
    tail = first["values"][5] * 0.9**5 + np.sum(first["rewards"][1:] * 0.9 ** np.arange(5))
    assert first["returns"][0] == pytest.approx(tail, abs=1e-3)
    starts = [episode["obs"][0]["true"][0, 0] for episode in page.episodes]
    assert starts[0] != starts[1]


def test_200_steps_of_images_stay_below_5_mb(make_run, view):
    """The pictures are rough, so they compress worse than those of simulators."""
    folder = make_run(*BALL, *DRIFT, "+env.sees=image", "+env.length=200")
    page = view(folder, BALL[0], DRIFT[1], episodes=1)
    assert page.episodes[0]["length"] == 200 and page.file.stat().st_size < 5_000_000
    imagined = page.episodes[0]["imagined"]
    assert imagined["horizon"] == 50 and imagined["every"] <= 16
    (obs,) = page.episodes[0]["obs"]
    assert len(obs["true"]) == 201 and len(obs["imagined"]) == len(imagined["rewards"]) * 51


def test_a_page_that_is_too_large_imagines_from_fewer_steps(make_run, view, monkeypatch):
    folder = make_run(*BALL, *DRIFT)
    monkeypatch.setattr(playback, "choose_every", lambda *args: 1)
    size = len(view(folder, BALL[0], DRIFT[1], horizon=10).file.read_text())
    monkeypatch.setattr(playback, "LIMIT", size - 100)
    page = view(folder, BALL[0], DRIFT[1], horizon=10)
    assert page.episodes[0]["imagined"]["every"] == 2
    assert page.episodes[0]["imagined"]["rewards"].shape == (6, 11)
    page = view(folder, BALL[0], DRIFT[1], horizon=10, every=1)  # as the user wants it
    assert page.episodes[0]["imagined"]["every"] == 1


def test_the_environment_is_rendered_where_no_image_is_observed(make_run, view):
    pytest.importorskip("pygame")
    folder = make_run(*SMALL_CARTPOLE)
    page = view(folder, max_steps=6, horizon=2, episodes=1)
    (episode,) = page.episodes
    assert episode["film"].shape == (episode["length"] + 1, 200, 300, 3)
    assert episode["film"].std() > 10 and episode["obs"][0]["names"][0] == "cart position"
    assert episode["actions"]["groups"] == [2]
    assert [part["name"] for part in episode["latents"]] == ["deterministic", "stochastic"]
    assert view(folder, max_steps=6, episodes=1, render=False).episodes[0]["film"] is None
    words = ["env.pixels=true", "env.image_size=64", "model.depth=2"]
    folder = make_run(*SMALL_CARTPOLE, *words)
    assert view(folder, max_steps=3, episodes=1).episodes[0]["film"] is None


def test_values_and_imagination_draw_no_number_of_the_run():
    class Noisy(torch.nn.Module):
        def value(self, state):
            return torch.rand(len(state), 1)

    states = worldloom.LatentState(torch.zeros(3, 2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (Dreamer(Noisy()).evaluate(states) for _ in range(2))
    assert np.array_equal(first, second) and torch.equal(before, torch.get_rng_state())
