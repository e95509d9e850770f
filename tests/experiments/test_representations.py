"""The arithmetic of experiments/representations; never how long anything takes."""

from experiments.representations import updates


def test_updates_of_all_representations_are_timed(capsys):
    updates.main(["--size=size1m", "--rounds=2", "--batch=1", "--length=3", "--obs=3,16,16"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == [f"| {f}" for f in updates.FAMILIES]


def test_ratios_are_taken_within_a_round():
    seconds = {"dreamerv3": [2.0, 4.0], "r2dreamer": [1.0, 3.0]}
    assert updates.table(seconds).endswith("| r2dreamer | 2,000 | 1,000 | 3,000 | 0.62 |")
