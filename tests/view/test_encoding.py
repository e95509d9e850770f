"""Arrays and pictures in the data of a page."""

import json

import numpy as np
import pytest

from tests.view.conftest import decode_array, decode_images
from worldloom.view.encoding import encode_array, encode_images


@pytest.mark.parametrize("bits", [8, 16])
def test_numbers_are_rounded_within_the_range_of_their_dimension(bits):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 4, 3)) * [1e-4, 1, 1e4]
    read = decode_array(json.loads(json.dumps(encode_array(values, bits))))
    step = np.ptp(values, axis=(0, 1)) / (2**bits - 2)
    assert read.shape == values.shape
    assert (abs(read - values) <= 0.5001 * step).all()
    for place in (values.argmin(), values.argmax()):
        assert read.flat[place] == pytest.approx(values.flat[place])


def test_what_is_no_number_is_nan_and_changes_no_other():
    values = np.array([[1.0, np.nan], [np.inf, np.nan], [3.0, np.nan], [-np.inf, np.nan]])
    read = decode_array(encode_array(values))
    np.testing.assert_allclose(read[:, 0], [1, np.nan, 3, np.nan])
    assert np.isnan(read[:, 1]).all()


@pytest.mark.parametrize("values", [[2.5, 2.5], [], [[7.0]]])
def test_constants_and_nothing_are_kept(values):
    read = decode_array(encode_array(np.array(values)))
    assert read.shape == np.shape(values) and np.array_equal(read, values)


@pytest.mark.parametrize(("count", "size"), [(1, 64), (17, 64), (300, 96), (3, 700)])
def test_pictures_come_back_in_order(count, size):
    shades = np.linspace(0, 255, count * 3).reshape(count, 1, 1, 3)
    images = np.broadcast_to(shades, (count, size, size, 3)).astype(np.uint8)
    packed = encode_images(images, 80)
    read = decode_images(packed)
    assert read.shape == images.shape
    middle = np.s_[:, size // 4 : -size // 4, size // 4 : -size // 4]  # colours bleed at borders
    assert abs(read[middle].astype(int) - images[middle]).max() < 16
    assert len(json.dumps(packed)) < images.nbytes / 10
