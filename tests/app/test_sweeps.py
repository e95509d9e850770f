"""Sweeps: real processes of the launcher, whose jobs are a small program instead of a training.

tests/test_sweeps.py has sweeps of real runs.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from worldloom import starting
from worldloom.app.sweep_folder import hold_sweep, read_differs, read_jobs
from worldloom.app.sweep_jobs import choose_gpus

# How a job's program begins, as `python -m worldloom.run` does: it claims the folder of the run.
BEGIN = """
import fcntl, json, os, signal, sys, time
from pathlib import Path

from worldloom import starting

starting.end_with_parent()
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = Path(given.get("resume") or given["hydra.run.dir"])
folder.mkdir(parents=True, exist_ok=True)
lock = open(folder / ".lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""
# It counts to 5 in the file `steps`, or continues there; its score is its seed. While the file
# `slow` exists, it waits after the first step. If the file `pair` exists, it waits for another job.
JOB = (
    BEGIN
    + """with open("starts", "a") as file:
    print(json.dumps({"args": sys.argv[1:], "omp": os.environ.get("OMP_NUM_THREADS"),
                      "full": os.environ.get("HYDRA_FULL_ERROR"),
                      "jobs": os.environ.get("WORLDLOOM_JOBS"), "at": time.time()}), file=file)
if "resume" not in given:
    (folder / "config.yaml").write_text(json.dumps(given))
given = json.loads((folder / "config.yaml").read_text())
if Path("broken").exists() and given["seed"] in Path("broken").read_text().split():
    (folder / "config.yaml").unlink()
    print("Traceback: ...\\nerror: seed " + given["seed"] + " is unlucky\\nto continue: ...")
    sys.exit(1)
stopped = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: stopped.append(number))
steps = folder / "steps"
while (done := len(steps.read_text()) if steps.exists() else 0) < 5:
    with steps.open("a") as file:
        file.write("x")
    if len([*folder.parent.glob("*/steps")]) == 2:
        Path("two").touch()
    while not stopped and (
        Path("slow").exists()
        or (Path("pair").exists() and len(Path("starts").read_text().splitlines()) < 2)
    ):
        time.sleep(0.01)
    if stopped:
        print(f"stopped by {signal.Signals(stopped[0]).name}; saved after {done} steps")
        sys.exit(128 + stopped[0])
(folder / "scores.yaml").write_text(f"step: 5\\nfinal/return: {float(given['seed'])}\\n")
with open("ends", "a") as file:
    print(time.time(), file=file)
"""
)
SIX = ["-m", "seed=0,1,2", "model=dreamerv3_tiny,tdmpc2_tiny", "sweep=name"]
THREE = ["-m", "seed=0,1,2", "sweep=name"]
NAMES = ["seed0", "seed1", "seed2"]
FOLDER = Path("runs/sweeps/name")


def add_program(folder, program):
    """Add a package worldloom to a folder, which Python finds in the working directory first."""
    (folder / "worldloom").mkdir()
    (folder / "worldloom" / "__init__.py").touch()
    (folder / "worldloom" / "run.py").write_text(program)
    shutil.copy(starting.__file__, folder / "worldloom")
    return folder


@pytest.fixture
def place(tmp_path):
    """A working directory with the program of the jobs."""
    return add_program(tmp_path, JOB)


@pytest.fixture
def sweep(commands, place):
    """Run a sweep, by default of three seeds: its exit code, stdout and stderr."""
    return lambda *words, **options: commands.run(words or THREE, place, **options)


def starts(place):
    file = place / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def states(place):
    return {name: job["state"] for name, job in read_jobs(place / FOLDER).items()}


def lengths(place):
    """How far each job has counted."""
    return [len((place / FOLDER / name / "steps").read_text()) for name in NAMES]


def test_six_jobs_of_which_two_fail(sweep, place):
    (place / "broken").write_text("1")
    done = sweep(*SIX)
    assert done["code"] == 1
    lines = [re.sub(r"\d+\.\d min", "T", line) for line in done["out"].splitlines()]
    assert lines == [
        "sweep runs/sweeps/name: 6 jobs, 0 of them finished",
        "dreamerv3_tiny-seed0: started",
        "dreamerv3_tiny-seed0: final return 0.0 (T; 1 of 6 finished)",
        "tdmpc2_tiny-seed0: started",
        "tdmpc2_tiny-seed0: final return 0.0 (T; 2 of 6 finished)",
        "dreamerv3_tiny-seed1: started",
        "dreamerv3_tiny-seed1: failed: seed 1 is unlucky (T; 2 of 6 finished)",
        "  log: runs/sweeps/name/logs/dreamerv3_tiny-seed1.log",
        "tdmpc2_tiny-seed1: started",
        "tdmpc2_tiny-seed1: failed: seed 1 is unlucky (T; 2 of 6 finished)",
        "  log: runs/sweeps/name/logs/tdmpc2_tiny-seed1.log",
        "dreamerv3_tiny-seed2: started",
        "dreamerv3_tiny-seed2: final return 2.0 (T; 3 of 6 finished)",
        "tdmpc2_tiny-seed2: started",
        "tdmpc2_tiny-seed2: final return 2.0 (T; 4 of 6 finished)",
        "4 of 6 jobs are finished; results: runs/sweeps/name",
        "to continue:",
        "python -m worldloom.run -m seed=0,1,2 model=dreamerv3_tiny,tdmpc2_tiny sweep=name",
    ]
    (said,) = done["err"].splitlines()
    assert said == (
        "error: 2 of 6 jobs failed or were stopped: dreamerv3_tiny-seed1, tdmpc2_tiny-seed1; what "
        "they printed is in runs/sweeps/name/logs"
    )
    job = read_jobs(place / FOLDER)["tdmpc2_tiny-seed1"]
    assert (job["state"], job["code"], job["error"]) == ("failed", 1, "seed 1 is unlucky")
    for start, name in zip(starts(place), states(place), strict=True):
        model, seed = name.split("-seed")
        assert {f"seed={seed}", f"model={model}", "sweep=name"} <= {*start["args"]}
        assert f"hydra.run.dir={FOLDER / name}" in start["args"]
        assert start["full"] is None  # which Hydra would read
        if seed != "1":
            assert read_differs(place / FOLDER / name) == {"seed": int(seed), "model": model}


def test_failed_jobs_start_again_with_the_next_command(sweep, place):
    (place / "broken").write_text("1")
    assert sweep()["code"] == 1
    (place / "broken").unlink()
    done = sweep()
    assert done["code"] == 0 and done["err"] == "" and "seed1: started" in done["out"]
    assert states(place) == dict.fromkeys(NAMES, "finished")
    assert len(starts(place)) == 4
    assert read_differs(place) == {}


def test_the_same_command_reads_finished_jobs_and_more_values_extend_it(sweep, place):
    sweep("-m", "seed=0,1", "training.batch_size=8")
    again = sweep("-m", "seed=0,1", "training.batch_size=8")
    folder = "runs/sweeps/batch_size8-seed"
    assert again["out"].splitlines() == [
        f"sweep {folder}: 2 jobs, 2 of them finished",
        f"2 of 2 jobs are finished; results: {folder}",
    ]
    more = sweep("-m", "training.batch_size=8", "seed=1,2")
    assert more["code"] == 0 and "seed2: final return 2.0 (0.0 min; 3 of 3 finished" in more["out"]
    single = sweep("-m", "seed=3", "training.batch_size=8", f"sweep={Path(folder).name}")
    assert single["code"] == 0 and "4 of 4 finished" in single["out"]
    assert [*read_jobs(place / folder)] == ["seed0", "seed1", "seed2", "seed3"]
    assert len(starts(place)) == 4


OTHERS = [
    (
        ["seed"],
        {"batch": "4"},
        "x have another batch (there: 8; now: 4); use the same override, or",
    ),
    (["seed"], {}, "x have another batch (there: 8; now: not given)"),
    (["seed"], {"batch": "8", "threads": "1"}, "another threads (there: not given; now: 1)"),
    (["seed", "model"], {"batch": "8"}, "give values for model as before, or use another sweep="),
    (["model"], {"batch": "8"}, "x differ in seed, but now in model; give values for model, seed"),
    ([], {"batch": "8"}, "x differ in seed, but now in nothing; give values for seed as before"),
]


@pytest.mark.parametrize(("varied", "fixed", "message"), OTHERS)
def test_a_folder_of_other_runs_is_rejected(tmp_path, varied, fixed, message):
    with hold_sweep(tmp_path / "x", ["seed"], {"batch": "8"}) as before:
        before.write()
    with pytest.raises(ValueError) as error, hold_sweep(tmp_path / "x", varied, fixed):
        pass
    assert message in str(error.value)
    with hold_sweep(tmp_path / "x", [], {"batch": "8", "seed": "3"}) as again:
        assert again.varied == ["seed"] and again.fixed == {"batch": "8"}


def test_only_one_process_drives_a_sweep(tmp_path):
    with hold_sweep(tmp_path, ["seed"], {}), pytest.raises(ValueError) as error:  # noqa: SIM117
        with hold_sweep(tmp_path, ["seed"], {}):
            pass
    assert f"another process runs the sweep {tmp_path}; wait for it, stop it" in str(error.value)
    assert not list(tmp_path.iterdir())  # nothing was started


def test_states_after_a_kill_are_not_taken_from_the_record(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "scores.yaml").touch()

    def found():
        return {name: job["state"] for name, job in read_jobs(tmp_path).items()}

    with hold_sweep(tmp_path, ["seed"], {}) as sweep:
        sweep.jobs = {name: {"state": "running"} for name in "abc"}
        sweep.jobs["d"] = {"state": "waiting"}
        sweep.write()
        assert found() == {"a": "finished", "b": "running", "c": "running", "d": "waiting"}
    assert found() == {"a": "finished", "b": "interrupted", "c": "interrupted", "d": "waiting"}
    with FileLock(tmp_path / "b" / ".lock"):
        assert found()["b"] == "running"


def test_all_jobs_are_validated_before_the_first_starts(sweep, place):
    mistakes = {
        "training.batch_size=4,0": "error: batch_size0: training.batch_size is 0; expected at",
        "model=dreamer,dreemer": "unknown model 'dreemer' (did you mean 'dreamer'?)",
        "seed=1,1": "several jobs of the sweep would have the folder runs/sweeps/seed/seed1",
        "hydra.launcher.jobs=two seed=0,1": "error: hydra.launcher.jobs is 'two'; expected",
        "seed=0,1 sweep=": "sweep is ''; expected a name",
        "seed=0,1 sweep=../x": "sweep is '../x'; expected a name",
        "seed=0,1 folder=worldloom/run.py/x": "worldloom/run.py is a file; choose another folder",
        "hydra.sweep.subdir=x seed=0,1": "hydra.sweep.subdir=x has no effect with -m; runs are in",
        "hydra.run.dir=x seed=0,1": "hydra.run.dir=x has no effect with -m; choose the folder",
    }
    for command, message in mistakes.items():
        refused = sweep("-m", *command.split())
        (line,) = refused["err"].splitlines()
        assert refused["code"] == 1 and message in line
    assert not (place / "runs").exists() and not starts(place)


def test_two_jobs_run_at_a_time_and_share_the_cores(sweep, place):
    (place / "pair").touch()
    assert sweep(*THREE, "hydra.launcher.jobs=2")["code"] == 0
    ended = sorted(float(line) for line in (place / "ends").read_text().split())
    assert ended[0] < starts(place)[2]["at"]  # never three
    assert {start["jobs"] for start in starts(place)} == {"2"}
    cores = len(os.sched_getaffinity(0))
    assert {start["omp"] for start in starts(place)} <= {"1", str(max(1, cores // 2))}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_stops_all_jobs_which_save_and_the_same_command_continues(sweep, place, number):
    (place / "slow").touch()
    stopped = sweep(*THREE, "hydra.launcher.jobs=2", kill=("two", number))
    assert stopped["code"] == 128 + number
    again = "python -m worldloom.run -m seed=0,1,2 sweep=name hydra.launcher.jobs=2"
    assert stopped["out"].splitlines()[-1] == again
    for name in NAMES[:2]:
        assert f"{name}: unfinished (stopped by {number.name}; saved after" in stopped["out"]
    assert [*states(place).values()] == ["interrupted", "interrupted", "waiting"]
    (place / "slow").unlink()
    done = sweep()
    assert done["code"] == 0 and "seed0: resumed" in done["out"]
    resumed = [start["args"] for start in starts(place)][2:4]
    assert resumed == [[f"resume={FOLDER / name}"] for name in NAMES[:2]]
    assert lengths(place) == [5, 5, 5]


def test_killed_sweeps_leave_no_jobs_which_save_and_the_same_command_continues(sweep, place):
    (place / "slow").touch()
    killed = sweep(kill=(str(FOLDER / "seed0" / "steps"), signal.SIGKILL))
    assert killed["code"] == -signal.SIGKILL
    (place / "slow").unlink()
    assert sweep()["code"] == 0  # at once: the job may still be saving
    log = (place / FOLDER / "logs" / "seed0.log").read_text()
    assert "stopped by SIGTERM; saved after" in log
    assert len(starts(place)) == 4 and lengths(place) == [5, 5, 5]


def test_quotes_folders_and_configurations_reach_the_jobs(sweep, place):
    (place / "mine").mkdir()
    done = sweep(
        *("-m", "seed=0,1", "folder='a b/it\\'s, x'", "~callbacks.open_loop", "name='my name'"),
        *("--config-dir", "mine", "hydra.job.chdir=false"),
    )
    assert done["code"] == 0, done
    folder = "a b/it's, x"
    words = starts(place)[0]["args"]
    assert words[:2] == ["--config-dir", str(place / "mine")]
    assert {"seed=0", "~callbacks.open_loop", "name='my name'", "hydra.job.chdir=false"} <= {*words}
    parsed = OverridesParser.create().parse_overrides(words[2:])
    values = {part.key_or_group: part.value() for part in parsed}
    assert values["hydra.run.dir"] == f"{folder}/seed0" and values["sweep"] == "it's, x"
    record = OmegaConf.load(place / folder / "sweep.yaml")
    assert record.varied == ["seed"] and record.fixed.name == "my name"
    job = record.jobs.seed0
    assert job.differs == {"seed": 0} and job.started <= job.ended and job.ended.endswith("+00:00")


def test_jobs_share_a_gpu_only_if_all_are_in_use():
    def chosen(devices, *in_use):
        return choose_gpus(
            ["0", "2", "5"], [SimpleNamespace(gpus=gpus) for gpus in in_use], devices
        )

    assert chosen(1) == ["0"] and chosen(1, ["0"]) == ["2"] and chosen(1, ["0"], ["5"]) == ["2"]
    assert chosen(2, ["2"]) == ["0", "5"] and chosen(2, ["0"], ["2"]) == ["5", "0"]
    assert chosen(1, ["0"], ["2"], ["5"], ["0"]) == ["2"] and chosen(9) == ["0", "2", "5"]
    assert chosen("auto") == chosen([1]) == chosen(-1) == choose_gpus([], [], 1) == []


def test_a_search_from_the_command_line(sweep, commands, place):
    pytest.importorskip("optuna")
    space = "search.space.training.learning_rate={low: 1e-4, high: 1e-2, log: true}"
    fixed = ["-m", "seed=3,5", "training.batch_size=8", "evaluation.every=0"]
    words = [*fixed, space, "sweep=name"]
    mistakes = {
        "search.sampler=RandmSampler": "(did you mean 'RandomSampler'?)",
        "training.learning_rate=1e-3": "is in search.space, but training.learning_rate=1e-3 was",
        "search.space.training.warmup={low: -1, high: 5}": "with training.warmup=-1: training.warm",
        "search.space.training.lr={low: 1, high: 5}": "space, with training.lr=1: unknown key",
        "hydra/launcher=local": "a search starts its runs on this machine",
        "search.pruner=MedianPruner": "evaluation.every is 0; add the environment steps between",
    }
    for word, message in mistakes.items():
        refused = sweep(*words, word)
        (line,) = refused["err"].splitlines()
        assert refused["code"] == 1 and message in line
    assert not (place / "runs").exists() and not starts(place)

    done = sweep(*words, "search.trials=2", "search.sampler=RandomSampler")
    assert done["code"] == 0, done
    assert "trial1-seed5: final return 5.0 (0.0 min; 2 of 2 trials done)" in done["out"]
    best = done["out"].splitlines()[-3:]
    assert best[0].startswith("best: trial0, return 4: training.learning_rate=0.00")
    again = f"{' '.join(fixed[2:])} {best[0].split()[-1]} seed=0,1,2,4,6"
    again = f"python -m worldloom.run -m {again}"
    assert best[1:] == ["to train it again with other seeds:", again]
    differs = read_differs(place / FOLDER / "trial1-seed5")
    assert differs["seed"] == 5 and 1e-4 < differs["training.learning_rate"] < 1e-2
    drawn = f"training.learning_rate={differs['training.learning_rate']!r}"
    assert {"seed=5", drawn, "training.batch_size=8"} <= {*starts(place)[3]["args"]}
    assert not [word for start in starts(place) for word in start["args"] if "search" in word]
    assert [*states(place)] == [f"trial{n}-seed{seed}" for n in (0, 1) for seed in (3, 5)]
    table = commands.good([FOLDER], place, module="worldloom.sweep")["out"]
    assert table.splitlines()[-1] == again and "trial1-seed5 learning_rate=0.00" in table

    other = sweep(*words, "search.trials=2", "search.sampler=RandomSampler", "search.seed=1")
    assert "have another search.seed (there: 0; now: 1)" in other["err"]
    other = sweep(*fixed, "sweep=name")
    assert "have another search.direction (there: maximize; now: not given)" in other["err"]
