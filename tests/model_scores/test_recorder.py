import numpy as np
import torch

from tests.model_scores.test_decisions import Agent, Point
from worldloom.acting import Actor, evaluate
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.model_scores.model import score_model
from worldloom.model_scores.recorder import RowRecorder
from worldloom.model_scores.report import describe_failures, describe_scores


def test_the_rows_of_an_evaluation_are_kept():
    env = make_vector_env([lambda: Point(length=40), lambda: Point(length=25)], 2)
    specs = (
        ObsSpec.from_space(env.single_observation_space),
        ActionSpec.from_space(env.single_action_space),
    )
    recorder = RowRecorder()
    results = evaluate(Actor(Agent()), env, *specs, 4, seed=3, record=recorder)
    window = recorder.window
    assert [result["length"] for result in results] == [40, 40, 25, 25]
    assert window["rewards"].shape == (2, 82)
    ends = [row.nonzero().flatten().tolist() for row in window["is_last"]]
    assert ends == [[40, 81], [25, 51, 77]]
    whole = window["rewards"][0]
    returns = [whole[:41].sum().item(), whole[41:].sum().item()]
    assert np.allclose(returns, [result["return"] for result in results[:2]], rtol=1e-5)
    assert (window["actions"][window["is_last"]] == 0).all()
    moved = window["obs"][:, :-1] + window["actions"][:, :-1]
    inside = ~window["is_first"][:, 1:]
    assert torch.allclose(moved[inside], window["obs"][:, 1:][inside])
    scores, failures = score_model(Agent(), window)
    assert not failures and scores["obs_error/15"] < 1e-9


def test_scores_are_printed_in_a_table():
    scores = {
        "obs_error/1": 0.01234,
        "obs_error/5": 0.5,
        "obs_error_no_change/1": 0.02,
        "obs_error_no_change/5": 1.5,
        "reward_error": 0.25,
        "reward_calibration": 0.125,
        "kl": 2.0,
    }
    assert describe_scores(scores) == [
        "steps ahead                 1        5",
        "observation error      0.0123      0.5",
        "error of no change       0.02      1.5",
        "rewards: error 0.25, calibration 0.125 standard deviations",
    ]
    assert describe_scores({}) == []
    assert describe_failures({"values": ValueError("no critic")}) == {
        "values": "the model's values are not scored: ValueError: no critic"
    }
