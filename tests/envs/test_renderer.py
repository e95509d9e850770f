import os
import subprocess
import sys

import numpy as np
import pytest

from worldloom.envs import renderer
from worldloom.envs.suites.gymnasium import make_env


@pytest.fixture(autouse=True)
def on_linux_without_a_choice(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")
    renderer.probe.cache_clear()
    yield
    renderer.probe.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Let use_renderer find MuJoCo although it may be missing; each test replaces the probe."""
    monkeypatch.setattr(renderer, "_is_installed", lambda package: package == "mujoco")


@pytest.mark.parametrize(
    ("broken", "chosen"), [((), "egl"), (("egl",), "osmesa"), (("osmesa",), "egl")]
)
def test_the_first_renderer_that_works_is_used(installed, monkeypatch, broken, chosen):
    tried = []

    def run(command, env, **kwargs):
        name = env["MUJOCO_GL"]
        tried.append(name)
        failed = name in broken
        return subprocess.CompletedProcess(command, int(failed), "", "no library\n" * failed)

    monkeypatch.setattr(subprocess, "run", run)
    renderer.use_renderer("mujoco")
    assert os.environ["MUJOCO_GL"] == chosen
    assert tried == ["egl", "osmesa"][: tried.index(chosen) + 1]
    renderer.use_renderer("mujoco")
    assert len(tried) <= 2  # the choice is made once


def test_the_users_choice_stays(installed, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr(subprocess, "run", None)  # trying anything would raise
    renderer.use_renderer("mujoco")
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_without_a_renderer_the_message_says_what_to_install(installed, monkeypatch):
    monkeypatch.setattr(renderer, "PROBE", "raise OSError('libGL is not here')")
    message = r"egl: OSError: libGL is not here.*apt install libegl1"
    with pytest.raises(renderer.RendererError, match=message):
        renderer.use_renderer("mujoco")
    assert os.environ["MUJOCO_GL"] == ""


def test_a_missing_package_is_named_before_a_renderer_is_tried(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_simulator'"):
        renderer.use_renderer("no_such_simulator")


def test_pictures_stay_right_when_others_are_closed(monkeypatch):
    """As when an evaluation beside the training has ended."""
    pytest.importorskip("mujoco", reason="needs the extra mujoco")
    monkeypatch.delenv("MUJOCO_GL")
    try:
        renderer.use_renderer("mujoco")
    except renderer.RendererError as error:
        pytest.skip(str(error))

    def frames(disturbed):
        env = make_env("InvertedPendulum-v5", pixels=True, image_size=32)
        seen = [env.reset(seed=0)[0]]
        for step in range(4):
            if disturbed and step == 1:
                other = make_env("InvertedPendulum-v5", pixels=True, image_size=32)
                other.reset(seed=5)
            if disturbed and step == 3:
                other.close()
            seen.append(env.step(np.ones(1, np.float32))[0])
        env.close()
        return np.stack(seen)

    alone, beside = frames(False), frames(True)
    assert alone.std() > 1
    np.testing.assert_array_equal(alone, beside)
