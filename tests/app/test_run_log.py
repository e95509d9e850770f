"""worldloom.log: what the terminal showed, without bars, with the traceback of an error."""

import logging
import os
import sys

import pytest
from tqdm import tqdm

from worldloom.app.run_log import record_output


def read(folder):
    return (folder / "worldloom.log").read_text()


def test_printed_lines_are_shown_and_recorded_and_bars_only_shown(tmp_path, capsys):
    with record_output(tmp_path):
        print("out", 1)
        bar = tqdm(total=3, file=sys.stderr)
        bar.update(2)
        tqdm.write("between", file=sys.stdout)
        bar.close()
        print("err", file=sys.stderr)
    print("later")
    out, err = capsys.readouterr()
    assert out == "out 1\nbetween\nlater\n" and "2/3" in err and err.endswith("err\n")
    assert read(tmp_path) == "out 1\nbetween\nerr\n"


def test_what_is_logged_appears_once_in_both(tmp_path, capsys, monkeypatch):
    handler = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    before = handler.stream
    with record_output(tmp_path):
        logging.getLogger("anything").warning("beware")
    assert capsys.readouterr().out == "beware\n" == read(tmp_path)
    assert handler.stream is before


def test_an_error_is_recorded_with_its_traceback_and_the_next_run_appends(tmp_path):
    streams = sys.stdout, sys.stderr
    with pytest.raises(ValueError), record_output(tmp_path):
        raise ValueError("wrong\nin two lines")
    assert (sys.stdout, sys.stderr) == streams
    with pytest.raises(AssertionError), record_output(tmp_path):
        raise AssertionError("a bug")
    text = read(tmp_path)
    assert text.count("Traceback (most recent call last)") == 2
    assert "\nerror: wrong in two lines\n" in text and text.endswith("AssertionError: a bug\n")


def test_a_full_disk_ends_no_run(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with record_output(tmp_path):
        monkeypatch.setattr(os, "write", full)
        print("shown")
    monkeypatch.undo()
    with record_output(tmp_path / "missing"):
        print("shown, too")
    assert capsys.readouterr().out == "shown\nshown, too\n" and read(tmp_path) == ""


def test_a_stream_that_outlives_the_run_writes_to_no_other_file(tmp_path, capsys):
    with record_output(tmp_path):
        kept = sys.stdout
    number = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)  # gets the number of the log
    print("late", file=kept)
    os.close(number)
    assert (tmp_path / "other").read_text() == "" == read(tmp_path)
    assert capsys.readouterr().out == "late\n"
