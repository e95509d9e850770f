"""The live page in a browser: what keys and sliders do is what the model imagines."""

import threading
from contextlib import contextmanager

import pytest

from tests.browser import Browser, find_chromium
from tests.view.live_models import STEPS, Sum, make_model, make_session
from worldloom.view.live import LivePage
from worldloom.view.server import LiveServer

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")
ABOUT = {"title": "run <1>", "facts": [["environment", "Sums"], ["model", "Sum"]]}


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@contextmanager
def serving(session):
    """Serve the page of a session; yield its address."""
    live = LivePage(session, ABOUT, ["a <note>"])
    with LiveServer(live.assemble(), live.answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.address
        finally:
            server.shutdown()


@pytest.fixture
def opened(browser):
    """Open the page of a model; return the tab and the session."""
    with_servers = []

    def call(model, space=None, **options):
        session = make_session(model) if space is None else make_session(model, space)
        server = serving(session)
        with_servers.append(server)
        page = browser.open(server.__enter__(), **options)
        page.wait("state.nodes.size === 1 && !busy")
        return page, session

    yield call
    for server in with_servers:
        server.__exit__(None, None, None)


def press(page, key, steps=1):
    """Press a key that imagines `steps` steps, and wait for them."""
    expected = page.evaluate("steps") + steps
    page.press(key)
    page.wait(f"steps === {expected} && !busy")


def shown(page, pane, key):
    text = page.evaluate(f"document.querySelector('#pane-{pane} [data-key={key}]').textContent")
    return float(text.replace("\N{MINUS SIGN}", "-"))


def at(page, session, pane):
    return session.nodes[page.evaluate(f"state.at.{pane}")]


def test_keys_move_through_the_model(opened):
    page, session = opened(Sum())
    press(page, "ArrowRight")
    node = at(page, session, "A")
    assert node.action.tolist() == [1, 0] and node.depth == 1 and at(page, session, "B").depth == 0
    assert shown(page, "A", "reward") == pytest.approx(node.reward, abs=0.01)
    page.press("ArrowDown")  # the next action
    press(page, "ArrowLeft")
    assert at(page, session, "A").action.tolist() == [1, -1]
    press(page, " ")
    assert at(page, session, "A").action.tolist() == [1, -1] and at(page, session, "A").depth == 3
    press(page, "p")
    assert at(page, session, "A").depth == 4 and abs(at(page, session, "A").action).max() <= 1
    page.press("Backspace", 2)
    assert page.evaluate("state.at.A") == 2 and not page.errors


def test_branches_are_compared(opened):
    page, session = opened(Sum())
    press(page, "ArrowRight")
    page.press("b")  # B continues from here
    assert page.evaluate("[state.active, state.at.A, state.at.B]") == ["B", 1, 1]
    press(page, "ArrowLeft")
    page.press("x")
    press(page, "ArrowRight")
    a, b = at(page, session, "A"), at(page, session, "B")
    assert a.parent == b.parent == 1 and a.total == pytest.approx(b.total + 1.0, abs=1e-5)
    for pane, node in (("A", a), ("B", b)):
        assert shown(page, pane, "total") == pytest.approx(node.total, abs=0.01)
    paths = page.evaluate(
        "['A', 'B'].map(name => listPath(state.at[name]).map(node => node.total))"
    )
    assert [len(path) for path in paths] == [3, 3] and paths[0][:2] == paths[1][:2]
    # Both branches are in the tree; a click on a state goes there.
    places = page.evaluate("[...placeNodes().places.values()].map(place => [place.x, place.line])")
    assert places == [[0, 0], [1, 0], [2, 0], [2, 1]]
    width = page.evaluate("document.getElementById('tree').clientWidth")
    height = page.evaluate("document.getElementById('tree').clientHeight")
    page.click("#tree", 20.5 / width, 17 / height)
    assert page.evaluate("state.at.A") == 0 and not page.errors


def test_a_slider_chooses_the_action_and_the_start(opened):
    page, session = opened(Sum())
    page.evaluate(
        "(input => { input.value = -0.5; input.dispatchEvent(new Event('input')); })"
        "(document.querySelectorAll('.joint input')[1])"
    )
    page.evaluate("document.activeElement.blur()")
    press(page, " ")
    assert at(page, session, "A").action.tolist() == [0, -0.5]
    page.evaluate(
        "(input => { input.value = 4; input.dispatchEvent(new Event('input')); })"
        "(document.getElementById('start'))"
    )
    page.click("#begin")
    page.wait("state.first === 4 && state.nodes.size === 1 && !busy")
    assert session.first == 4 and len(session.nodes) == 1
    press(page, "r")
    assert at(page, session, "A").row == 5
    assert "reward of the episode 5" in page.evaluate(
        "document.querySelector('#pane-A .hint').textContent"
    )
    press(page, "r")
    page.press("r")  # the episode has ended
    assert page.evaluate("document.getElementById('status').textContent") == "the episode ends here"
    assert at(page, session, "A").row == STEPS and not page.errors


def test_choices_have_keys_and_buttons(opened):
    page, session = opened(*make_model("dreamer-choices"))
    names = page.evaluate(
        "[...document.querySelectorAll('#actions button')].map(b => b.textContent)"
    )
    assert names == ["1 left", "2 stay", "3 right"]
    press(page, "2")
    assert at(page, session, "A").action.tolist() == [0, 1, 0]
    press(page, "ArrowRight")
    assert at(page, session, "A").action.tolist() == [0, 0, 1]
    page.click("#actions button")
    page.wait("steps === 4 && !busy")
    assert at(page, session, "A").action.tolist() == [1, 0, 0]
    assert "left" in page.evaluate("document.querySelector('#pane-A .taken').textContent")
    page.click("#run")  # the policy acts on and on
    page.wait("steps > 8")
    page.click("#run")
    assert not page.errors


def test_images_are_those_of_the_model(opened):
    page, session = opened(*make_model("dreamer"))
    press(page, "r")
    node = at(page, session, "A")
    captions = page.evaluate(
        "[...document.querySelectorAll('#pane-A figcaption')].map(c => c.textContent)"
    )
    assert captions == ["observation, imagined", "observation, true"]
    pixels = page.evaluate(
        "[...document.querySelectorAll('#pane-A canvas')].map(c => "
        "[...c.getContext('2d').getImageData(3, 5, 1, 1).data])"
    )
    truth = session.recordings[0].obs[""][1]
    for pixel, image in zip(pixels, (node.obs[""], truth), strict=True):
        assert pixel == [*image[:, 5, 3].astype(int).tolist(), 255]
    assert not page.errors


def test_the_page_asks_its_server_alone_and_shows_text_as_text(opened):
    page, _ = opened(Sum(without=("obs",)))
    assert {url.rsplit("/", 1)[0] for url in page.requests} == {page.evaluate("location.origin")}
    assert page.evaluate("document.getElementById('title').textContent") == "run <1>"
    assert page.evaluate("document.querySelector('#notes li').textContent") == "a <note>"
    assert "decodes no observations" in page.evaluate(
        "document.querySelector('.pane .empty').textContent"
    )
    assert not page.errors


def test_an_error_of_the_model_is_shown_and_the_page_goes_on(opened):
    page, session = opened(Sum())
    predict, session.model.predict = session.model.predict, None
    page.press(" ")
    page.wait("document.getElementById('status').className === 'failed'")
    assert "TypeError" in page.evaluate("document.getElementById('status').textContent")
    session.model.predict = predict
    press(page, " ")
    assert at(page, session, "A").depth == 1


@pytest.mark.parametrize("width", [1600, 800])
def test_nothing_is_wider_than_the_window(opened, width):
    page, _ = opened(Sum(), width=width)
    press(page, " ")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
