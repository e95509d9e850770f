"""Every case of `misbehaving`, in this process and in a worker: the same outcome in both."""

import logging
import re
import signal

import cloudpickle
import numpy as np
import pytest

from tests.envs import misbehaving
from tests.envs.misbehaving import CASES, HANGING, LENGTH, SPACES, Odd
from worldloom.check.environment import EnvProblems, check_env
from worldloom.envs import contract
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import RowStream, make_vector_env

cloudpickle.register_pickle_by_value(misbehaving)
STEPS = 30
# Those that end nothing run side by side in one worker.
HARMLESS = [
    name
    for name, (*_, outcome) in CASES.items()
    if outcome == "same" or outcome[0] == "same without success"
]
FLAGS = ("rewards", "is_first", "is_last", "is_terminal")


@pytest.fixture(autouse=True)
def reports_anew(monkeypatch, caplog):
    monkeypatch.setattr(contract, "_reported", set())
    caplog.set_level(logging.WARNING)


def play(names, space, workers=0, **options):
    """Return all rows of one environment for each case, the ended episodes, and the faults."""
    left = iter(names)
    env = make_vector_env(lambda: Odd(next(left), space), len(names), workers, **options)
    try:
        obs_spec = ObsSpec.from_space(env.single_observation_space)
        rows = RowStream(env, obs_spec, ActionSpec.from_space(env.single_action_space))
        rows.reset(0)
        seen, ended = [copy_of(rows)], []
        for _ in range(STEPS):
            ended += rows.step(np.zeros((len(names), 1), np.float32))
            seen.append(copy_of(rows))
        return seen, ended, rows.restarts
    finally:
        env.close()


def copy_of(rows):
    obs = rows.obs if isinstance(rows.obs, dict) else {"": rows.obs}
    return {**obs, **{name: getattr(rows, name) for name in FLAGS}}


def require_equal(seen, wanted, keys=()):
    for one, other in zip(seen, wanted, strict=True):
        for key in keys or other:
            assert one[key].dtype == other[key].dtype
            np.testing.assert_array_equal(one[key], other[key])


def outcome_of(name):
    outcome = CASES[name][2]
    return (outcome,) if isinstance(outcome, str) else outcome


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", [name for name in CASES if name not in HARMLESS])
def test_a_misbehaving_environment_has_its_outcome(name, workers, caplog):
    space, (kind, words) = CASES[name][0], outcome_of(name)
    if kind in ("error", "fault"):
        with pytest.raises((ValueError, ChildProcessError)) as raised:
            play(["", name], space, workers)
        first, *trace = str(raised.value).splitlines()
        assert re.search(words, first) and re.search("environment 1|the environment", first), first
        assert kind == "error" or "3 times without a finished episode" in first
        assert not trace or isinstance(raised.value, ChildProcessError)
        return
    seen, ended, restarts = play([name] * 2, space, workers)
    wanted, episodes, _ = play(["", ""], space)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert len(re.findall(words, said)) == 1, said
    if kind == "note":
        assert restarts == 0
        require_equal(seen, wanted, FLAGS)
        return
    assert kind == "once" and restarts == 2
    assert all(np.isfinite(row[key]).all() for row in seen for key in row)
    assert len(ended) == len(episodes) - 2 and {e["length"] for _, e in ended} == {LENGTH}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("space", SPACES)
def test_what_is_clear_is_read_as_it_is_meant(space, workers, caplog):
    names = [name for name in HARMLESS if CASES[name][0] == space] or [""]
    seen, ended, restarts = play(names, space, workers)
    wanted, episodes, _ = play([""] * len(names), space)
    require_equal(seen, wanted)
    assert restarts == 0
    for index, name in enumerate(names):
        kept = [episode for at, episode in episodes if at == index]
        if name and outcome_of(name)[0] == "same without success":
            kept = [{k: v for k, v in episode.items() if k != "success"} for episode in kept]
        assert [episode for at, episode in ended if at == index] == kept, name
    said = " ".join(record.getMessage() for record in caplog.records)
    assert said.count("info['success'] is") == (space == "box"), said


@pytest.mark.parametrize("name", [n for n in HARMLESS if len(outcome_of(n)) > 1])
def test_a_success_that_is_no_number_is_reported_once(name, caplog):
    play([name], "box")
    (record,) = caplog.records
    assert re.search(outcome_of(name)[1], record.getMessage())


@pytest.mark.parametrize("name", HANGING)
def test_a_call_that_never_returns_ends_after_the_timeout(name):
    place = HANGING[name][2][1]
    with pytest.raises(ValueError) as raised:
        play(["", name], "box", timeout=0.2)
    text = rf"environment 1 took longer than 0\.2 seconds {place} \(misbehaving.py:\d+\)"
    assert re.match(text, str(raised.value)), raised.value
    with pytest.raises(EnvProblems) as found:
        check_env(lambda: Odd(name), timeout=0.2)
    assert f"the environment took longer than 0.2 seconds {place}" in str(found.value)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_the_program_is_left_alone():
    def handle(*_):
        pass

    before = signal.signal(signal.SIGALRM, handle)
    try:
        play([""], "box", timeout=1e-9)
        assert signal.getsignal(signal.SIGALRM) is handle
    finally:
        signal.signal(signal.SIGALRM, before)
