"""`worldloom view RUN --serve` as a process: its address, its answers, and its end."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.view.conftest import BALL, DRIFT, HERE
from worldloom.app.command_line import split_settings
from worldloom.app.compose import Overrides
from worldloom.app.task import open_saved_run
from worldloom.view.__main__ import ViewConfig
from worldloom.view.live import serve_run

TRUST = [word for word in (*BALL, *DRIFT) if "_target_" in word]


def test_a_port_belongs_to_serving():
    with pytest.raises(ValueError, match="port is 8000; expected 0 without --serve"):
        ViewConfig(port=8000)
    with pytest.raises(ValueError, match="port is 70000; expected from 0 to 65535"):
        ViewConfig(port=70_000, serve=True)


def test_a_port_in_use_is_told(make_run):
    folder = make_run(*BALL, *DRIFT)
    config, section = open_saved_run(folder, split_settings(Overrides(tuple(TRUST)))[1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = vars(ViewConfig(serve=True, episodes=1, max_steps=3)) | {"port": port}
        with pytest.raises(ValueError, match=f"port is {port}, which cannot be used"):
            serve_run(folder, config, section, SimpleNamespace(**settings), torch.device("cpu"))


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(make_run):
    folder = make_run(*BALL, *DRIFT)
    env = {**os.environ, "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "worldloom", "view", str(folder), "--serve"]
    refused = subprocess.run(command, env=env, capture_output=True, text=True)
    assert refused.returncode == 1 and "third-party code" in refused.stderr
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, *TRUST, "episodes=1"], env=env, **pipes)
    try:
        assert process.stdout is not None
        own = re.match(r"http://(127\.0\.0\.1:\d+)/", line := process.stdout.readline())
        assert own, line
        connection = http.client.HTTPConnection(own[1], timeout=60)
        headers = {"Origin": f"http://{own[1]}", "Content-Type": "application/json"}
        start = json.dumps({"episode": 0, "step": 5, "sample": 0})
        connection.request("POST", "/start", start, headers)
        (node,) = json.loads(connection.getresponse().read())["nodes"]
        connection.request("POST", "/step", json.dumps({"node": 0, "actions": [[0.5]]}), headers)
        (moved,) = json.loads(connection.getresponse().read())["nodes"]
        assert moved["reward"] == pytest.approx(node["reward"] + 0.05, abs=1e-5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stdout.read() == ""
        connection.close()
    finally:
        process.kill()
        process.communicate()
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "model"}
    assert not (folder / "playback.html").exists()
