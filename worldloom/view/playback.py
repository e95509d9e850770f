"""The playback page of a run: episodes are played, imagined from, and written into one file."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldloom.app.run_dir import find_run
from worldloom.app.saved_run import add_render_mode
from worldloom.app.task import Task, load_actor
from worldloom.errors import escape
from worldloom.files import write_text
from worldloom.view.contents import describe_episode, describe_run
from worldloom.view.episodes import Recorder, Recording
from worldloom.view.imagination import Dreamer, name_arrays
from worldloom.view.page import assemble

FILE = "playback.html"  # in the folder of the run
LIMIT = 5_000_000  # bytes of the file, unless `every` is given
# Estimated bytes of JSON of a pixel and of a number.
PIXEL, NUMBER = 0.2, 2.7


def write_page(
    path: Path, config: Mapping[str, Any], env: Mapping[str, Any], settings: Any, device: Any
) -> str:
    """Play episodes of a run, write the page, and return lines about it.

    path: of the run, as for `open_saved_run`, which returns config and env.
    settings: a `ViewConfig`.
    """
    notes: list[str] = []
    task, renders = open_task(env, settings.render, notes)
    actor = load_actor(path, config, task, device)
    options = (settings.seed, settings.deterministic, settings.max_steps, renders)
    recorder = Recorder(task, actor, *options)
    recordings = recorder.record(settings.episodes)
    dreamer = Dreamer(actor.model)
    every = settings.every or choose_every(recordings, dreamer, settings.horizon)
    imagined = [dreamer.imagine(episode, every, settings.horizon) for episode in recordings]
    measured = [
        (
            dreamer.evaluate(episode.states),
            dreamer.discount(episode.states),
            dreamer.measure_surprise(episode),
        )
        for episode in recordings
    ]
    notes = [escape(" ".join(x.split())) for x in (*notes, *recorder.notes, *dreamer.notes)]
    run = find_run(path)
    about = describe_run(run, {**config, "env": dict(env)}, actor.model)
    while True:
        episodes = [
            describe_episode(recording, part, *numbers, task.actions)
            for recording, part, numbers in zip(recordings, imagined, measured, strict=True)
        ]
        page = assemble(about["title"], {"run": about, "notes": notes, "episodes": episodes})
        if len(page) <= LIMIT or settings.every or imagined[0].every >= settings.max_steps:
            break
        imagined = [part.thin(2) for part in imagined]
    file = run / FILE if settings.out is None else Path(settings.out).expanduser()
    write_text(file, page)
    steps, count = sum(recording.length for recording in recordings), len(recordings)
    every = imagined[0].every
    about_file = f"{len(page) / 1e6:.1f} MB, {count} episode{'s' * (count > 1)}, {steps:,} steps"
    starts = "every step" if every == 1 else f"every {every} steps"
    opening = f"open it in a browser: {file.resolve().as_uri()}"
    return "\n".join([*notes, f"{escape(file)}: {about_file}, imagined from {starts}; {opening}"])


def open_task(env: Mapping[str, Any], renders: bool, notes: list[str]) -> tuple[Task, bool]:
    """Return the task of an env section, and whether its environments are to be rendered.

    renders: whether they may be; they are if they can and the model observes no image.
    notes: gets a line if the environment cannot be made with a renderer.
    """
    task = Task.from_config(env, collects=False)
    if not renders or any(len(part.shape) == 3 for part in task.obs.parts.values()):
        return task, False
    section = add_render_mode(env, "rgb_array")
    try:
        return (task if section == env else Task.from_config(section, collects=False)), True
    except (ValueError, TypeError, ImportError) as error:
        notes.append(f"no pictures of the environment, which cannot render: {error}")
    return task, False


def choose_every(recordings: Sequence[Recording], dreamer: Dreamer, horizon: int) -> int:
    """Return the smallest distance between starts with which the page is probably small enough."""
    first = recordings[0]
    decoded = name_arrays(dreamer.decode(first.states[0]).get("obs"))
    shapes = [first.obs[key].shape[1:] for key in decoded if key in first.obs]
    pixels = sum(shape[1] * shape[2] for shape in shapes if len(shape) == 3)
    numbers = sum(math.prod(shape) + 1 for shape in shapes if len(shape) < 3) + 4
    cost = (PIXEL * pixels + NUMBER * numbers) * (horizon + 1)
    rows = sum(recording.length for recording in recordings)
    return max(1, math.ceil(rows * cost / (0.6 * LIMIT)))
