"""Atomic writes, and YAML files that are read as plain data."""

import os
import stat

import pytest

from worldloom.files import atomic_write, read_yaml, reject_interpolations, write_text


def test_an_exception_leaves_the_old_file_and_no_other(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as stream:
        stream.write(b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_its_target_is_left_alone(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_yaml_is_read_as_plain_data(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1e-3\nnone: null\nlist: [1, {b: true}]\ntext: a:b\n")
    expected = {"lr": 0.001, "none": None, "list": [1, {"b": True}], "text": "a:b"}
    assert read_yaml(tmp_path / "a.yaml", "fix it") == expected
    (tmp_path / "a.yaml").write_text("")
    assert read_yaml(tmp_path / "a.yaml", "fix it") == {}


@pytest.mark.parametrize(
    "text",
    [
        *("a: [oops", "\x00", "3", "a: 1\na: 2", "[" * 1500, "a: ${", "a: 1\n---\nb: 2"),
        # tags and aliases
        *("a: !!python/object/apply:os.system [x]", "a: !!str 3", "!x {}", "a: &b 1\nc: *b"),
        *("- ? !!python/name:os.system\n  : 1", "a: [!!python/module:os {}]"),
        # interpolations, wherever they are
        *("a: ${b}\nb: 1", "a: x${b}\nb: 1", "a: ['${oc.env:HOME}']", "a: {b: ['${.c}']}"),
        *("'${b}': 1", "a: {'x${b}': 1}", r"a: \${b}"),
    ],
)
def test_anything_else_is_rejected_in_one_line(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml (is not valid YAML .*fix it|contains )"):
        read_yaml(tmp_path / "a.yaml", "fix it")


def test_interpolations_are_kept_as_text_where_they_are_allowed(tmp_path):
    (tmp_path / "a.yaml").write_text("a: ${b}\nb: 1\n")
    tree = read_yaml(tmp_path / "a.yaml", "fix it", interpolations=True)
    assert tree == {"a": "${b}", "b": 1}


def test_interpolations_are_found_in_any_tree():
    reject_interpolations({"a": (1, ["$x", {"b": "{}"}], None)}, "here")
    with pytest.raises(ValueError, match=r"here contains '\$\{x\}'"):
        reject_interpolations({"a": (1, [{"b": "${x}"}])}, "here")
