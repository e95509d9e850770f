"""What TensorBoard shows of the events, in its own pages in a headless Chromium."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.browser import Browser, find_chromium
from worldloom.glossary import GLOSSARY, find_metric
from worldloom.training.dashboard import CHARTS, FIRST_SCREEN, RESULTS
from worldloom.training.drawing import HEIGHT, WIDTH, draw_curves, draw_film
from worldloom.training.loggers import TensorBoard

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's packages

SETTINGS = {"task": "CartPole-v1", "model": "DreamerV3", "seed": 0, "learning_rate": 6e-4}
SETTINGS |= {"train_ratio": None, "total_steps": 4000, "batch_size": 16, "betas": [0.9, 0.99]}
ROWS = [row for rows in GLOSSARY.values() for row in rows]
FILMS = ("picture", "film")
NAMES = [row.name for row in ROWS if not row.meaning.startswith(FILMS)]
SCALARS = [*dict.fromkeys([*(name for name in NAMES if name == name.lower()), *FIRST_SCREEN])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with events of all kinds."""
    folder = tmp_path_factory.mktemp("runs")
    board = TensorBoard(folder)
    board.log_hyperparams({"seed": 0, "model": {"units": 32}})
    board.log_hyperparams(SETTINGS, {}, 0)
    for step in (0, 100, 200):
        board.log_metrics({name: float(step) for name in SCALARS}, step)
    rng = np.random.default_rng(0)
    curves = draw_curves([("[0]", rng.normal(size=20), np.zeros(20))], "obs", 5)
    film = draw_film(*rng.uniform(0, 255, (2, 3, 9, 3, 64, 64)), [9, 9, 7], 5)
    for name, picture in (("open_loop", curves), ("open_loop/view", film)):
        board.log_picture(f"imagination/{name}", picture, 200)
    board.log_hyperparams(SETTINGS, {"final/return": 9.0}, 200)
    board.finalize("success")
    return folder


# ---- the events ----------------------------------------------------------------------------------


def test_the_first_screen_repeats_metrics_that_keep_their_names(folder):
    board = EventAccumulator(str(folder)).Reload()
    assert {*SCALARS} <= {*board.Tags()["scalars"]}
    for name, tag in FIRST_SCREEN.items():
        assert [e.value for e in board.Scalars(tag)] == [e.value for e in board.Scalars(name)]
    assert {*board.Tags()["scalars"]} == {*SCALARS, *FIRST_SCREEN.values()}


def test_metrics_have_the_descriptions_of_the_glossary(folder):
    about = EventAccumulator(str(folder)).Reload().summary_metadata
    for name in SCALARS:
        assert about[name].summary_description == f"`{name}`: {find_metric(name).describe()}"
    tag = FIRST_SCREEN["fps/env"]
    assert about[tag].summary_description == about["fps/env"].summary_description


def test_metrics_of_a_custom_model_need_no_row(tmp_path):
    board = TensorBoard(tmp_path)
    board.log_metrics({"loss/mine_loss": torch.tensor(2.5), "mine": np.float32(1)}, 3)
    board.log_metrics({"nested": {"a": 1.0, "b": 2.0}}, 4)
    board.finalize("success")
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/mine_loss")] == [(3, 2.5)]
    assert list(tmp_path.glob("nested_*"))  # Lightning writes these as further runs


# ---- the pages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(folder):
    """The address of a TensorBoard that serves the folder."""
    if find_chromium() is None:
        pytest.skip("needs Chromium")
    from tensorboard import program

    board = program.TensorBoard()
    board.configure([None, "--logdir", str(folder), "--port", "0", "--load_fast", "false"])
    return board.launch()


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


# All visible text of a page, also in shadow roots.
TEXT = """(() => {
    const walk = node => node.nodeType === 3 ? node.textContent
        : ["STYLE", "SCRIPT"].includes(node.nodeName) ? ""
        : (node.shadowRoot ? walk(node.shadowRoot) : "") + [...node.childNodes].map(walk).join(" ");
    return walk(document.body).replace(/\\s+/g, " ");
})()"""


def test_the_first_screen_shows_learning_speed_and_health(browser, url):
    page = browser.open(url)
    page.wait("document.querySelectorAll('.group-title').length > 5")
    groups = page.evaluate("[...document.querySelectorAll('.group-title')].map(x => x.title)")
    assert groups[:4] == ["", "1 at a glance", "2 speed and health", "counters"]  # "": pinned cards
    assert {name.split("/")[0] for name in SCALARS} < {*groups}
    # Only the first two groups are open; cards below the window are empty so far.
    cards = "[...document.querySelectorAll('scalar-card-component .tag')].map(x => x.title)"
    page.wait(f"{cards}.length >= 4")
    shown = page.evaluate(cards)
    assert shown == sorted(FIRST_SCREEN.values())[: len(shown)]
    assert page.evaluate("document.querySelectorAll('card-view').length") == len(FIRST_SCREEN)


def test_pictures_are_shown_without_scaling_down(browser, url):
    page = browser.open(url, height=1400)
    group = "[...document.querySelectorAll('.group-toolbar')].find(x => /imagin/.test(x.innerText))"
    page.wait(f"!!{group}")
    page.evaluate(f"{group}.click(); {group}.scrollIntoView()")
    images = "[...document.querySelectorAll('image-card img')]"
    page.wait(f"{images}.length == 2 && {images}.every(x => x.complete && x.naturalWidth)")
    sizes = page.evaluate(
        f"{images}.map(x => [x.naturalWidth, x.naturalHeight, x.width, x.height])"
    )
    assert sizes[0][:2] == [WIDTH, HEIGHT]
    for wide, high, *shown in sizes:
        assert shown[1] >= high and shown[0] * high >= 0.99 * wide * shown[1]


def test_charts_are_below_their_questions(browser, url):
    page = browser.open(f"{url}#custom_scalars")
    last = [*CHARTS][-1]
    page.wait(f"{TEXT}.includes({json.dumps(last)})")
    text = page.evaluate(TEXT)
    assert sorted(CHARTS, key=text.index) == [*CHARTS]


def test_the_configuration_and_the_glossary_are_texts(browser, url):
    page = browser.open(f"{url}#text")
    page.wait(f"{TEXT}.includes('units: 32') && {TEXT}.includes('TD-MPC2')")
    text = page.evaluate(TEXT)
    for row in ROWS:
        assert f"{row.name} " in text and row.meaning[:20] in text


def test_settings_that_matter_are_selected(browser, url):
    page = browser.open(f"{url}#hparams")
    page.wait(f"{TEXT}.includes('Hyperparameters') && {TEXT}.includes('final/return')")
    checked = page.evaluate(
        """(() => {
            const found = [];
            const walk = node => {
                if (node.nodeName === "PAPER-CHECKBOX" && node.checked)
                    found.push(node.textContent.trim());
                if (node.shadowRoot) walk(node.shadowRoot);
                node.childNodes.forEach(walk);
            };
            walk(document.body);
            return found;
        })()"""
    )
    shown = {"task", "model", "seed", "learning_rate", "total_steps"}  # train_ratio is null
    assert {name for name in checked if name in SETTINGS} == shown
    assert {name for name in checked if "/" in name} == {*RESULTS}
    assert not [name for name in checked if "_target_" in name]
