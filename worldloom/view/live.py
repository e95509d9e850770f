"""The live page: what it shows of a session, and the requests by which it acts in the model."""

import base64
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.app.run_dir import find_run
from worldloom.app.task import Task, load_actor
from worldloom.errors import escape, require
from worldloom.view.contents import describe_run
from worldloom.view.episodes import Recorder, to_rgb
from worldloom.view.page import assemble
from worldloom.view.server import LiveServer
from worldloom.view.session import Node, Session

STYLES, SCRIPTS = ("page.css", "live.css"), ("data.js", "charts.js", "live.js")
MOST_STEPS = 200  # of one request
ROUNDED = 6  # decimals of numbers


def serve_run(
    path: Path, config: Mapping[str, Any], env: Mapping[str, Any], settings: Any, device: Any
) -> None:
    """Serve the live page of a run until Ctrl-C; its address is printed.

    path: of the run, as for `open_saved_run`, which returns config and env.
    settings: a `ViewConfig`.

    Raises:
        ValueError: the port is in use.
    """
    task = Task.from_config(env, collects=False)
    actor = load_actor(path, config, task, device)
    options = (settings.seed, settings.deterministic, settings.max_steps, False)
    recorder = Recorder(task, actor, *options)
    session = Session(actor, task.actions, recorder.record(settings.episodes))
    about = describe_run(find_run(path), {**config, "env": dict(env)}, actor.model)
    live = LivePage(session, about, recorder.notes)
    try:
        server = LiveServer(live.assemble(), live.answer, settings.port)
    except OSError as error:
        raise ValueError(
            f"port is {settings.port}, which cannot be used ({error.strerror}); leave it out for a "
            "free one"
        ) from error
    with server, suppress(KeyboardInterrupt):
        print(
            f"{server.address}  (open it in a browser on this machine; Ctrl-C ends it)", flush=True
        )
        server.serve_forever()


class LivePage:
    """Answers the requests of the live page; plain data in and out.

    about: facts about the run, as `describe_run` returns them. notes: lines to show.
    """

    def __init__(self, session: Session, about: Mapping[str, Any], notes: Sequence[str]) -> None:
        self.session, self.about, self.notes = session, about, list(notes)

    def assemble(self) -> str:
        """Return the page, with the episodes to start from and the names of the actions."""
        session, names = self.session, self.session.recordings[0].names
        data = {
            "run": {name: self.about[name] for name in ("title", "facts")},
            "notes": self.notes,
            "episodes": [
                {"name": escape(episode.name), "length": episode.length}
                for episode in session.recordings
            ],
            "actions": {
                "names": names.actions,
                "groups": list(session.groups) if session.spec.discrete else None,
            },
            "obs": names.obs,
        }
        title = f"{self.about['title']}: inside the model"
        files: Any = {"markup": "live.html", "styles": STYLES, "scripts": SCRIPTS}
        return assemble(title, data, **files, connects=True)

    def answer(self, request: str, body: Any) -> dict[str, Any]:
        """Answer a request, "start" or "step", with plain data.

        start {"episode", "step", "sample"}: returns {"nodes": [the start], "recorded": the actions
            of the episode after it}.
        step {"node", "actions": [[A numbers], ...]} or {"node", "policy": number of steps}: returns
            {"nodes": [...]}, each the child of the one before.

        Raises:
            ValueError: something is missing or does not fit.
        """
        if not isinstance(body, dict):
            raise ValueError(f"the request is a {type(body).__name__}; expected an object")
        if request == "start":
            keys = ("episode", "step", "sample")
            node = self.session.start(*(read_whole(body, key) for key in keys))
            rest = self.session.recording.actions[self.session.first :]
            return {"nodes": [self.describe(node)], "recorded": round_numbers(rest)}
        number = read_whole(body, "node")
        if "policy" in body:
            actions: list[Any] = [None] * read_whole(body, "policy", MOST_STEPS)
        else:
            actions = body.get("actions", [])
            fits = isinstance(actions, list) and 0 < len(actions) <= MOST_STEPS
            require(fits, "actions", actions, f"a list of 1 to {MOST_STEPS}")
            actions = [self.session.read_action(action) for action in actions]
        nodes = []
        for action in actions:
            node = self.session.step(number, action)
            nodes.append(self.describe(node))
            number = node.number
        return {"nodes": nodes}

    def describe(self, node: Node) -> dict[str, Any]:
        """Return a state as plain data, with the truth if it imagines a recorded row."""
        recording, truth = self.session.recording, None
        if node.row is not None:
            rows = {key: array[node.row] for key, array in recording.obs.items()}
            truth = {
                "obs": [describe_obs(key, array) for key, array in rows.items()],
                "reward": round_numbers(recording.rewards[node.row]),
            }
        numbers = {"reward": node.reward, "continue": node.proceeds, "value": node.value}
        numbers |= {"total": node.total, "reach": node.reach}
        return {
            "id": node.number,
            "parent": node.parent,
            "depth": node.depth,
            "action": None if node.action is None else round_numbers(node.action),
            **{name: round_numbers(number) for name, number in numbers.items()},
            "obs": [describe_obs(key, array) for key, array in node.obs.items()],
            "truth": truth,
            "notes": self.session.notes,
        }


def describe_obs(key: str, array: np.ndarray) -> dict[str, Any]:
    """Return an observation, an image [C, H, W] or a vector of any shape, as plain data."""
    name = escape(key or "observation")
    if array.ndim != 3:
        return {"key": name, "name": key, "kind": "vector", "values": round_numbers(array.ravel())}
    image = to_rgb(array[None])[0]
    data = base64.b64encode(image.tobytes()).decode()
    return {
        "key": name,
        "kind": "image",
        "height": image.shape[0],
        "width": image.shape[1],
        "data": data,
    }


def read_whole(body: Mapping[str, Any], key: str, most: int = 2**32 - 1) -> int:
    """Return a whole number of a request, or raise ValueError."""
    value = body.get(key)
    fits = type(value) is int and 0 <= value <= most
    require(fits, key, value, f"a whole number from 0 to {most}")
    return int(value)  # type: ignore[arg-type]


def round_numbers(numbers: Any) -> Any:
    """Return a number or an array as JSON has it: rounded, with None for NaN and infinity."""
    if numbers is None:
        return None
    if isinstance(numbers, np.ndarray) and numbers.ndim:
        return [round_numbers(number) for number in numbers]
    number = float(numbers)
    return round(number, ROUNDED) if math.isfinite(number) else None
