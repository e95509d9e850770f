import pytest

from worldloom.errors import find_similar, list_names, require, require_positive, suggest


def test_a_setting_that_does_not_hold_is_named_with_its_value_and_what_was_expected():
    require(True, "vmin", 3, "below 2")
    with pytest.raises(ValueError, match=r"^mode is 'yes'; expected true or false$"):
        require(False, "mode", "yes", "true or false")


def test_the_first_number_below_one_is_named():
    require_positive(a=1, b=0.5 + 0.5)
    with pytest.raises(ValueError, match=r"^b is 0; expected at least 1$"):
        require_positive(a=2, b=0, c=-1)


def test_similar_names():
    names = ["units", "Depth", "deter"]
    assert find_similar("unitss", names) == ["units"]
    assert find_similar("depth", names, count=2) == ["Depth", "deter"]
    assert find_similar("zzz", names) == []
    assert suggest("unitss", names) == " (did you mean 'units'?)"
    assert suggest("unitss", names, "encoder.") == " (did you mean 'encoder.units'?)"
    assert suggest("zzz", names) == ""


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), ("abcde", "a, b, c, d, e"), ("abcdefg", "a, b, c, d, e and 2 more")],
)
def test_long_lists_of_names_are_shortened(names, text):
    assert list_names(iter(names)) == text
