"""The page in a browser: frames, slider, keys, imagination from another step, and safety."""

import json

import numpy as np
import pytest

from tests.view.conftest import BALL, DRIFT, TDMPC2
from tests.view.scenes import HOSTILE
from worldloom.view.page import assemble

# The colours [height, width, 3] of a canvas.
PIXELS = """(canvas => {
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return [canvas.height, canvas.width, ...data.filter((_, i) => i % 4 !== 3)];
})"""
CANVASES = "[...document.querySelectorAll('.pictures canvas')]"
EVIL = "</script><script>hacked = 2</script><!--"


@pytest.fixture(scope="module")
def written(make_run, view):
    """A page with a dict of an image and a vector, and hostile names."""
    folder = make_run(*BALL, *DRIFT, "+env.sees=dict", "+env.length=30", "+model.drift=0.005")
    config = folder / "config.yaml"
    text = config.read_text()
    assert "\nname: " in text
    lines = [f"name: '{EVIL}'" if x.startswith("name: ") else x for x in text.splitlines()]
    config.write_text("\n".join([*lines, ""]))
    return view(folder, BALL[0], DRIFT[1], horizon=8, every=2, episodes=2)


@pytest.fixture
def page(written, browser):
    page = browser.open(written.file.as_uri(), width=1600)
    settle(page)
    yield page
    assert page.errors == []
    assert page.requests == [written.file.as_uri()]
    page.call("Page.close")


def settle(page):
    """Wait until everything is drawn."""
    page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
    page.wait("performance.now() > 0 && !pending")


def read_canvas(page, number):
    page.wait(f"{CANVASES}[{number}].width > 1")
    height, width, *values = page.evaluate(f"{PIXELS}({CANVASES}[{number}])")
    return np.array(values).reshape(height, width, 3)


def find_picture(episode):
    return next(part for part in episode["obs"] if part["key"] == "camera")


def show(number):
    """Return a number below 10 as the page does."""
    text = f"{number:.{3 if abs(number) < 1 else 2}f}"
    return text.rstrip("0").rstrip(".").replace("-", "\N{MINUS SIGN}")


def caption(page, number):
    return page.evaluate(f"document.querySelectorAll('.pictures figcaption')[{number}].innerText")


def test_frames_are_those_of_the_step(page, written):
    camera = find_picture(written.episodes[0])
    for step in range(3):
        settle(page)
        page.wait(f"{CANVASES}[0].getContext('2d').getImageData(5, 5, 1, 1).data[3] === 255")
        assert abs(read_canvas(page, 0) - camera["true"][step]).max() <= 3
        assert abs(read_canvas(page, 1) - camera["imagined"][step]).max() <= 3
        assert f"step {step}" in caption(page, 0)
        page.press("ArrowRight")
    # Column 3 of the imagination from row 0.
    settle(page)
    assert "3 steps ahead" in caption(page, 1)
    assert page.evaluate("document.getElementById('step-value').textContent") == "3 of 30"


def test_the_imagination_starts_anew_from_another_step(page, written):
    episode = written.episodes[0]
    camera = find_picture(episode)
    page.press("f")
    page.press("ArrowRight", 13)
    settle(page)
    assert "not imagined from here" in caption(page, 1)
    assert read_canvas(page, 1).max() == 0
    page.press("i")
    settle(page)
    # There are starts at every second step, so it is the one before.
    assert page.evaluate("[state.step, state.start]") == [13, 12]
    assert page.evaluate("document.getElementById('start-value').textContent") == "step 12"
    assert "1 step ahead" in caption(page, 1)
    assert abs(read_canvas(page, 1) - camera["imagined"][6 * 9 + 1]).max() <= 3
    text = page.evaluate("document.getElementById('panels').innerText")
    reward, value = (episode["imagined"][name][6, 1] for name in ("rewards", "values"))
    assert f"imagined {show(reward)}" in text and f"imagined {show(value)}" in text
    page.press("[")
    assert page.evaluate("state.start") == 10
    page.press("]", 2)
    assert page.evaluate("state.start") == 14
    page.click("#here")
    assert page.evaluate("state.start") == 12


def test_it_follows_the_current_step(page):
    page.press("ArrowRight", 9)
    assert page.evaluate("[state.step, state.start]") == [9, 8]
    page.press("ArrowLeft", 5)
    assert page.evaluate("[state.step, state.start]") == [4, 4]


def test_sliders_keys_and_buttons(page):
    page.evaluate("find('step').value = 21; find('step').dispatchEvent(new Event('input'))")
    assert page.evaluate("[state.step, state.start]") == [21, 20]
    page.evaluate("find('start').value = 6; find('start').dispatchEvent(new Event('input'))")
    settle(page)
    assert page.evaluate("[state.start, find('start').value]") == [6, "6"]
    for key, step in (("End", 30), ("ArrowRight", 30), ("Home", 0), ("ArrowLeft", 0)):
        page.press(key)
        assert page.evaluate("state.step") == step
    page.click("#forward")
    assert page.evaluate("state.step") == 1
    # The keys of a focused slider move it once.
    page.evaluate("find('step').focus()")
    page.press("ArrowRight")
    settle(page)
    assert page.evaluate("[state.step, find('step').value]") == [2, "2"]
    page.press("ArrowDown")
    assert page.evaluate("[state.number, state.step, find('episode').value]") == [1, 0, "1"]
    page.press("ArrowUp")
    page.evaluate("find('speed').value = '50'")
    page.press("-")
    assert page.evaluate("find('speed').value") == "20"
    page.press("+")
    page.press(" ")
    assert page.evaluate("find('play').getAttribute('aria-label')") in ("Play", "Pause")
    page.wait("state.step === 30 && !state.playing")
    # A click on a curve goes to its step; one on the overview of errors chooses the start.
    page.click(".right .steps canvas")
    assert page.evaluate("state.step") in range(13, 19)
    page.click(".left .steps canvas", 0.9)
    assert page.evaluate("state.start") in range(24, 30)
    assert page.evaluate("state.step") in range(13, 19)


def test_text_of_a_run_is_shown_as_text(page, written):
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('img, script').length") == 7
    page.evaluate("document.querySelector('details').open = true")
    text = page.evaluate("document.body.innerText")
    assert HOSTILE in text and EVIL in text
    blocked = """(() => {
        const script = document.createElement("script");
        script.textContent = "hacked = 3";
        document.body.append(script);
        return typeof hacked;
    })()"""
    assert page.evaluate(blocked) == "undefined"
    (error,) = page.errors
    assert "Content Security Policy" in error
    page.errors.clear()
    assert EVIL not in written.file.read_text()


def test_light_and_dark_at_both_widths(written, browser):
    backgrounds = {}
    for dark in (False, True):
        for width in (800, 1600):
            page = browser.open(written.file.as_uri(), width=width, dark=dark)
            settle(page)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            backgrounds[dark] = sum(map(int, colour[4:-1].split(",")))
            assert page.errors == []
            page.call("Page.close")
    assert backgrounds[False] > 600 and backgrounds[True] < 150


def test_every_control_and_picture_has_a_name(page):
    nameless = """[...document.querySelectorAll("button, input, select, canvas")].filter(e =>
        !(e.getAttribute("aria-label") || e.innerText || e.labels?.length || e.hidden)
        && e.offsetParent).map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_plans_are_drawn(make_run, view, browser):
    folder = make_run(*BALL, *TDMPC2)
    written = view(folder, BALL[0], horizon=3, episodes=1)
    page = browser.open(written.file.as_uri())
    page.press("ArrowRight", 4)
    settle(page)
    taken = written.episodes[0]["actions"]["values"][4, 0]
    text = page.evaluate("document.getElementById('panels').innerText")
    assert "Plan" in text and "Surprise" in text and f"taken {show(taken)}" in text
    assert page.errors == []


def test_discrete_actions_and_plans_are_drawn(make_run, view, browser):
    words = ["env=gymnasium", "env.id=CartPole-v1", "threads=1", *TDMPC2]
    written = view(make_run(*words), horizon=3, episodes=1, max_steps=8, render=False)
    page = browser.open(written.file.as_uri())
    page.press("ArrowRight", 3)
    settle(page)
    taken = written.episodes[0]["actions"]["values"][3].argmax()
    text = page.evaluate("document.getElementById('panels').innerText")
    assert f"taken action {taken}" in text and "pole angle" in text
    assert page.errors == []


def test_a_policy_names_the_scripts_and_no_address():
    page = assemble("<b>&", {"text": "</script>{{style}}"})
    policy = page.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src &#x27;none&#x27;; img-src data:; style-src &#x27;sha256-")
    assert "unsafe" not in policy and "connect-src" not in policy
    assert "connect-src &#x27;self&#x27;" in assemble("x", {}, connects=True)
    assert "<title>&lt;b&gt;&amp;</title>" in page
    assert json.loads('"\\u003c/script\\u003e{{style}}"') == "</script>{{style}}"
    assert page.count('{"text":"\\u003c/script\\u003e{{style}}"}') == 1
    assert page.count("<style>") == 1
