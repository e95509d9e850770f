import os
import subprocess
import sys

import pytest

from worldloom.envs import renderer


@pytest.fixture(autouse=True)
def on_linux_without_a_choice(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")
    renderer._failure.cache_clear()
    yield
    renderer._failure.cache_clear()


@pytest.mark.parametrize(
    ("broken", "chosen"), [((), "egl"), (("egl",), "osmesa"), (("osmesa",), "egl")]
)
def test_the_first_renderer_that_works_is_used(monkeypatch, broken, chosen):
    tried = []

    def run(command, env, **kwargs):
        name = env["MUJOCO_GL"]
        tried.append(name)
        failed = name in broken
        return subprocess.CompletedProcess(command, int(failed), "", "no library\n" * failed)

    monkeypatch.setattr(subprocess, "run", run)
    renderer.use_renderer()
    assert os.environ["MUJOCO_GL"] == chosen
    assert tried == ["egl", "osmesa"][: tried.index(chosen) + 1]
    renderer.use_renderer()
    assert len(tried) <= 2  # the choice is made once


def test_the_users_choice_stays(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.setattr(subprocess, "run", None)  # trying anything would raise
    renderer.use_renderer()
    assert os.environ["MUJOCO_GL"] == "glfw"


def test_without_a_renderer_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(renderer, "PROBE", "raise OSError('libGL is not here')")
    with pytest.raises(RuntimeError, match=r"egl: OSError: libGL is not here.*apt install libegl1"):
        renderer.use_renderer()
    assert os.environ["MUJOCO_GL"] == ""
