import numpy as np
import pytest
from PIL import ImageColor

from worldloom.envs.reward_panel import HEIGHT, MODEL, TRUE, WIDTH, RewardPanel

BLUE, RED = (ImageColor.getrgb(colour) for colour in (TRUE, MODEL))


def draw(rewards, predicted, length=None, image=None):
    """Return the picture of the newest step: the image and the part below it."""
    panel = RewardPanel(length)
    for pair in zip(rewards, predicted, strict=True):
        panel.add(*pair)
    image = np.full((300, 320, 3), 7, np.uint8) if image is None else image
    whole = panel.draw(image)
    return whole[: len(image)], whole[len(image) :]


def curve(below, colour):
    """Return rows and columns of a colour in the lower part, without the text."""
    rows, columns = np.nonzero((below[24:] == colour).all(-1))
    return rows, columns


def test_the_image_stays_and_the_panel_is_below_it():
    image = np.random.default_rng(0).integers(256, size=(300, 320, 3), dtype=np.uint8)
    above, below = draw([1.0], [2.0], image=image)
    assert (above == image).all() and below.shape == (HEIGHT, 320, 3)


def test_a_narrow_image_gets_room_for_the_text():
    above, below = draw([1.0], [2.0], image=np.zeros((200, 100, 3), np.uint8))
    assert above.shape[1] == below.shape[1] == WIDTH
    black = np.flatnonzero((above == 0).all((0, 2)))
    assert (black[0], black[-1]) == (78, 177)


def test_curves_show_both_rewards_up_to_now():
    _, below = draw([0, 1, 0, 1], [1, 0, 1, 0], length=8)
    for colour in (BLUE, RED):
        rows, columns = curve(below, colour)
        assert rows.max() - rows.min() > 40  # from the lowest to the highest value
        assert columns.min() == pytest.approx(46, abs=2)
        # Step 4 of 8: three sevenths of the width between the margins.
        assert columns.max() == pytest.approx(46 + (320 - 6 - 46) * 3 / 7, abs=2)
    blue, red = curve(below, BLUE), curve(below, RED)
    first = [rows[columns < 50].mean() for rows, columns in (blue, red)]
    assert first[0] > 40 > 10 > first[1]  # 0 below, 1 above


def test_a_peak_of_one_step_among_thousands_is_seen():
    rewards = np.zeros(20_000)
    rewards[12_345] = 1.0
    rows, columns = curve(draw(rewards, rewards * np.nan)[1], BLUE)
    assert columns[rows < 8].mean() == pytest.approx(46 + (320 - 52) * 12_345 / 20_000, abs=3)


def test_the_numbers_are_those_of_the_newest_step():
    panels = [draw([5, x], [5, y])[1][:24] for x, y in ((1, 2), (1, 3), (4, 2))]
    same = draw([9, 1], [9, 2])[1][:24]
    assert (same == panels[0]).all()
    assert (panels[0] != panels[1]).any() and (panels[0] != panels[2]).any()
    assert all((p == colour).all(-1).any() for p in panels for colour in (BLUE, RED))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rewards_that_are_missing_leave_a_gap(value):
    _, below = draw([0, 1, 2], [value] * 3)
    assert len(curve(below, BLUE)[0]) and not len(curve(below, RED)[0])
    draw([value], [value])


def test_an_episode_starts_without_a_reward():
    panel = RewardPanel()
    panel.add(3.0, 4.0)
    before = panel.draw(np.zeros((256, 256, 3), np.uint8))
    panel.restart()
    below = panel.draw(np.zeros((256, 256, 3), np.uint8))[256:]
    assert (before[256:] != below).any()
    assert not len(curve(below, BLUE)[0]) and not len(curve(below, RED)[0])
