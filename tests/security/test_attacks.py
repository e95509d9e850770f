"""Run folders, datasets and sweeps of an attacker, given to every command.

`evil`, a module that can be imported, writes the file `canary` when it is imported or called. A
neighbouring run has to stay as it is, byte for byte.
"""

import os
import re
import shutil
import subprocess

import pytest
import yaml

from tests.security.test_hostile_files import reject, write_npz
from worldloom import load_run
from worldloom.app.compose import Overrides
from worldloom.app.resume import resume_arguments
from worldloom.app.saved_config import adopt_dataset_env, format_command
from worldloom.app.task import open_saved_run
from worldloom.collect import CollectConfig, collect
from worldloom.errors import escape, quote
from worldloom.replay.block_files import BlockFiles
from worldloom.results.runs import read_jobs
from worldloom.results.tables import tabulate_jobs, write_csv, write_json, write_table

SLOW = pytest.mark.slow
SMALL = [
    *("threads=1", "env.workers=0", "env.num_envs=2", "model=dreamerv3_tiny", "model.deter=16"),
    *("model.units=8", "model.hidden=8", "model.classes=4", "model.stoch=4"),
    *("training.batch_size=2", "training.sequence_length=4", "training.total_steps=24"),
    *("training.train_ratio=8", "training.anneal=0", "training.warmup=1", "evaluation.every=0"),
    *("evaluation.episodes=1", "data.capacity=1000", "~callbacks.open_loop"),
]


@pytest.fixture(scope="module")
def trained(commands, tmp_path_factory):
    """A finished run, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained")
    commands.good([*SMALL, "folder=run"], folder)
    return folder / "run"


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A folder with `hostile`, to be changed, `neighbour`, and the module evil."""
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(
        f"import os\nos.system('touch {canary}')\ndef make(*a, **k): os.system('touch {canary}')\n"
    )
    for name in ("hostile", "neighbour"):
        shutil.copytree(trained, tmp_path / name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path / "neighbour")
    yield tmp_path
    assert not canary.exists(), "code of the file was executed"
    assert contents(tmp_path / "neighbour") == before


def contents(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def change(run, *pairs, text=""):
    """Set keys of a config.yaml, and append a text to it."""
    file = run / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    for key, value in pairs:
        *parents, last = key.split("/")
        node = tree
        for part in parents:
            node = node[part]
        node[last] = value
    file.write_text(yaml.safe_dump(tree) + text)


def said(call, *args):
    """The message of a ValueError, or "" for a call that succeeds."""
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


EVIL = {"_target_": "evil.make"}
SYSTEM = {"_target_": "os.system", "_args_": ["touch canary"]}
# Keys and values of a config.yaml, each of which would run code or read a secret.
CODE = {
    "resolver: environment": [("name", "${oc.env:HOME}")],
    "resolver: with a default": [("env/id", "${oc.env:NO,evil:E-v0}")],
    "resolver: decode": [("callbacks/x", "${oc.decode:'{_target_: evil.make}'}")],
    "resolver: create": [("callbacks/x", "${oc.create:{_target_:evil.make}}")],
    "resolver: select": [("name", "${oc.select:seed}")],
    "resolver: keys": [("name", "${oc.dict.keys:env}")],
    "resolver: hydra": [("name", "${hydra:runtime.cwd}")],
    "resolver: now": [("name", "${now:%Y}")],
    "nested": [("name", "${oc.env:${seed}}")],
    "nested reference": [("name", "${${seed}}")],
    "relative": [("env/time_limit", "${.image_size}")],
    "relative to a parent": [("env/time_limit", "${..seed}")],
    "brackets": [("name", "${env[id]}")],
    "escaped": [("name", "\\${oc.env:HOME}")],
    "escaped twice": [("name", "\\\\${oc.env:HOME}")],
    "joined": [("seed", "$"), ("name", "${seed}{oc.env:HOME}")],
    "in a list": [("optimizer/betas", ["${oc.env:HOME}", 1])],
    "in a key": [("${oc.env:HOME}", 1)],
    "target: callback": [("callbacks/x", EVIL)],
    "target: logger": [("logger/x", SYSTEM)],
    "target: model": [("model/_target_", "evil.make")],
    "target: environment": [("env/_target_", "evil.make")],
    "target: optimizer": [("optimizer/_target_", "evil.make")],
    "target: planner": [("planner/_target_", "evil.make")],
    "target: trainer": [("trainer/_target_", "evil.make")],
    "target by reference": [("name", "evil.make"), ("model/_target_", "${name}")],
    "target of another section": [("model/_target_", "lightning.Trainer")],
    "target in an argument": [("trainer/profiler", EVIL)],
    "target in a list": [("trainer/plugins", [[EVIL]])],
    "target in an option of the optimizer": [("optimizer/betas", SYSTEM)],
    "target in a nested argument": [("callbacks/progress/x", {"y": [{"z": SYSTEM}]})],
    "target in a strategy": [("trainer/strategy", {"_target_": "evil.make"})],
    "target below a timeout": [("trainer/strategy", {"timeout": {"seconds": EVIL}})],
    "target: null and arguments": [("callbacks/x", {"_target_": None, "_args_": ["x"]})],
    "partial": [("callbacks/checkpoint/_partial_", True)],
    "args": [("callbacks/checkpoint/_args_", ["neighbour", "1updates"])],
    "recursive": [("trainer/_recursive_", False)],
    "convert": [("trainer/_convert_", "object")],
    "get_method": [("callbacks/x", {"_target_": "hydra.utils.get_method", "path": "os.system"})],
    "eval": [("logger/x", {"_target_": "builtins.eval", "_args_": ["__import__('evil')"]})],
    "import_target": [("env/_target_", "worldloom.factory.import_target")],
    "custom suite": [("env/_target_", "worldloom.envs.suites.custom.make_env")],
    "id of a module": [("env/id", "evil:E-v0")],
    "id of a module, in an argument": [("env/worlds", [{"a": "evil:E-v0"}])],
    "id by reference": [("name", "evil:E-v0"), ("env/id", "${name}")],
    "defaults": [("defaults", [{"model": "dreamerv3_tiny"}])],
    "hydra": [("hydra", {"searchpath": ["file:///tmp"]})],
    "flag as a key": [("--config-dir=x", EVIL)],
    "several words as a key": [("callbacks/x y", EVIL)],
}
# Those that a command which only acts does not use.
TRAINS = re.compile(
    "joined|target: (callb|log|opt|trai|null)|target (in|below)|^(part|args|rec|conv|get|eval|sev)"
)


@pytest.mark.parametrize("name", CODE)
def test_a_configuration_executes_nothing(name, here):
    run = here / "hostile"
    change(run, *CODE[name])
    overrides = Overrides(("resume=hostile", "training.total_steps=48"))
    assert said(resume_arguments, overrides, here), "resumed"
    readers = {
        "load_run": lambda: load_run(run).actor,
        "eval": lambda: open_saved_run(run / "checkpoints" / "last.ckpt", Overrides(())),
        "collect": lambda: collect(CollectConfig("hostile", 1, "data")),
    }
    for reader, call in readers.items():
        assert said(call) or TRAINS.search(name), f"{reader} has accepted it"


# Attacks of which one command line each is executed in a process of its own.
@pytest.mark.parametrize(
    ("module", "words", "name"),
    [
        ("run", "resume=hostile training.total_steps=48", "target: callback"),
        ("run", "resume=hostile training.total_steps=48", "flag as a key"),
        ("run", "resume=hostile training.total_steps=48", "target by reference"),
        ("eval", "checkpoint=hostile", "id of a module"),
        ("eval", "checkpoint=hostile/model", "target: model"),
        ("eval", "checkpoint=hostile/checkpoints/last.ckpt", "resolver: with a default"),
        ("collect", "policy=hostile episodes=1 out=data", "target: environment"),
    ],
)
def test_commands_execute_nothing(module, words, name, here, commands):
    change(here / "hostile", *CODE[name])
    done = commands.run(words.split(), here, module=f"worldloom.{module}", path=here)
    assert done["code"] == 1 and done["err"].startswith("error: "), done
    assert len(done["err"].splitlines()) == 1


def test_commands_that_read_many_runs_execute_nothing(trained, here, commands):
    for number, name in enumerate(CODE):
        folder = here / "runs" / str(number)
        folder.mkdir(parents=True)
        for file in ("config.yaml", "metrics.csv", "worldloom.log"):
            shutil.copy(trained / file, folder / file)
        change(folder, *CODE[name])
    out = commands.good(["runs", "format=json"], here, module="worldloom.sweep", path=here)["out"]
    assert out.count('"job"') == len(CODE)
    commands.good(
        ["runs", "out=plot.csv", "metric=loss/loss"], here, module="worldloom.plot", path=here
    )


def test_a_dataset_executes_nothing(here, commands):
    for name, env in {
        "target": {"_target_": "evil.make"},
        "id": {"_target_": "worldloom.envs.suites.gymnasium.make_env", "id": "evil:E-v0"},
        "key": {"_target_": "other.make", "id=evil:E-v0 x": 1},
        "resolver": {
            "_target_": "worldloom.envs.suites.gymnasium.make_env",
            "id": "${oc.env:HOME}",
        },
        "partial": {"_target_": "worldloom.envs.suites.gymnasium.make_env", "_partial_": True},
        "custom": {"_target_": "worldloom.envs.suites.custom.make_env", "make": "evil.make"},
    }.items():
        folder = here / name
        folder.mkdir()
        write_npz(folder / "000.npz")
        (folder / "dataset.yaml").write_text(yaml.safe_dump({"format": 1, "env": env}))
        plain = {"env": {"from_data": True}, "data": {"path": name}}
        message = said(adopt_dataset_env, plain)
        assert message
        for line in re.findall("add: (.*?);", message):
            assert "evil" not in line or name in ("target", "id", "custom"), line
    words = ["data=offline", "data.path=id", "folder=new", "model=dreamerv3_tiny"]
    done = commands.run(words, here, path=here)
    assert done["code"] == 1 and done["err"].startswith("error: id names an environment"), done


# Places to write to -------------------------------------------------------------------------------

BOTH = "worldloom.training.checkpoints.Checkpoints"
WANDB, MLFLOW = "worldloom.training.wandb_logger.WandB", "worldloom.training.mlflow_logger.MLflow"
PLACES = {
    "callbacks/checkpoint/folder": "{here}/neighbour/checkpoints",
    "callbacks/checkpoint/every/folder": "neighbour/checkpoints",
    "callbacks/progress/dirpath": "neighbour",
    "callbacks/progress/filename": "../../neighbour/checkpoints/last",
    "callbacks/second": {"_target_": BOTH, "folder": "hostile/../neighbour/checkpoints"},
    "callbacks/third": {"_target_": BOTH, "folder": "${folder}/../neighbour/checkpoints"},
    "logger/csv/folder": "neighbour",
    "logger/tensorboard/folder": "~/neighbour",
    "logger/wandb": {"_target_": WANDB, "folder": "{here}/neighbour"},
    "logger/wandb2": {"_target_": WANDB, "folder": "${folder}", "dir": "neighbour"},
    "logger/wandb3": {"_target_": WANDB, "folder": "${folder}", "settings": {"root_dir": "/tmp"}},
    "logger/mlflow": {"_target_": MLFLOW, "folder": "${folder}", "tracking_uri": "neighbour"},
    "logger/mlflow2": {"_target_": MLFLOW, "folder": "${folder}", "tracking_uri": "sqlite:///x.db"},
    "logger/mlflow3": {"_target_": MLFLOW, "folder": "${folder}", "tags": {"a": "file:neighbour"}},
    "logger/mlflow4": {"_target_": MLFLOW, "folder": ".", "artifact_location": "s3://theirs"},
    "trainer/default_root_dir": "{here}/neighbour",
    "trainer/strategy": {"timeout": {"path": ["neighbour"]}},
}


def fill(value, here):
    if isinstance(value, dict):
        return {key: fill(item, here) for key, item in value.items()}
    return value.replace("{here}", str(here)) if isinstance(value, str) else value


@pytest.mark.parametrize("key", PLACES)
def test_a_configuration_names_no_other_place(key, here):
    changes = [("callbacks/checkpoint/every", {})] if "every" in key else []
    change(here / "hostile", *changes, (key, fill(PLACES[key], here)))
    message = said(resume_arguments, Overrides(("resume=hostile", "training.total_steps=48")), here)
    assert "never writes outside of the run's folder" in message
    # What the message asks for is what a user types.
    given = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {message.partition('add: ')[2]}"],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert given and all(g.startswith(key.split("/")[0]) for g in given)
    words = ("resume=hostile", "training.total_steps=48", *given)
    assert not said(resume_arguments, Overrides(words), here)


def test_a_configuration_without_a_folder_is_that_of_its_folder(here):
    change(here / "hostile", ("logger/csv/folder", "neighbour"))
    file = here / "hostile" / "config.yaml"
    file.write_text(re.sub(r"(?m)^folder: .*\n", "", file.read_text()))
    message = said(resume_arguments, Overrides(("resume=hostile", "training.total_steps=48")), here)
    assert "add: logger.csv.folder=neighbour" in message


@SLOW
def test_a_moved_run_writes_where_it_is(here, commands):
    """Also if a place is repeated: the checkpoints of the neighbour are another run's."""
    shutil.move(here / "hostile", here / "moved")
    commands.good(["resume=moved", "training.total_steps=48"], here)
    assert not (here / "hostile").exists()
    change(here / "moved", ("callbacks/checkpoint/folder", str(here / "neighbour/checkpoints")))
    done = commands.run(["resume=moved", "training.total_steps=72"], here)
    assert done["code"] == 1 and "callbacks.checkpoint.folder=" in done["err"]


LINKS = (
    *("config.yaml", "scores.yaml", "metrics.csv", "worldloom.log", ".lock", "checkpoints"),
    *("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "checkpoints/replay", "model"),
    *("checkpoints/parts", "model/config.yaml", "model/model.safetensors", "wandb", "mlflow"),
    *("wandb/run_id", "mlflow/run_id", "model_checkpoints", "events.out.tfevents.1"),
    *("checkpoints/nonfinite.ckpt", "checkpoints/replay/0-000000-rows.bin", ".hydra"),
)


@pytest.mark.parametrize("kind", ["link", pytest.param("broken link", marks=SLOW), "pipe"])
@pytest.mark.parametrize("name", LINKS)
def test_a_run_folder_leads_nowhere_else(name, kind, here):
    path, target = here / "hostile" / name, here / "neighbour" / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target if kind == "link" and target.exists() else here / "missing")
    assert said(resume_arguments, Overrides(("resume=hostile", "training.total_steps=48")), here)
    assert said(load_run, here / "hostile")
    read_jobs([here])  # neither waits for a pipe nor changes what a link leads to


def test_commands_replace_links(here, commands):
    """Each command that writes, where a link to the neighbour has the name of its file."""
    victim = here / "neighbour" / "metrics.csv"
    for name in (
        "plot.csv",
        "plot.png",
        "plot.svg",
        "film.gif",
        "log/worldloom.log",
        "data/dataset.yaml",
    ):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).symlink_to(victim)
    (here / "sweep" / "logs").mkdir(parents=True)
    (here / "sweep" / "logs" / "seed0.log").symlink_to(victim)
    (here / "locked").mkdir()
    (here / "locked" / "worldloom.log").write_text("error: broken\n")
    (here / "locked" / ".lock").symlink_to(victim)
    for module, words, code in (
        ("plot", ["neighbour", "out=plot.csv", "metric=loss/loss"], 0),
        ("eval", ["checkpoint=neighbour", "video=film.gif", "env.id=CartPole-v1"], None),
        ("run", [*SMALL, "folder=log"], 1),
        ("run", ["-m", *SMALL, "seed=0,1", "folder=sweep"], 1),
        ("collect", ["policy=neighbour", "episodes=1", "out=data"], 1),
        ("sweep", ["locked"], 0),
    ):
        done = commands.run(words, here, module=f"worldloom.{module}")
        assert code in (None, done["code"]) and "Traceback" not in done["err"], (module, done)
    if pytest.importorskip("matplotlib"):
        for name in ("plot.png", "plot.svg"):
            commands.run(
                ["neighbour", f"out={name}", "metric=loss/loss"], here, module="worldloom.plot"
            )
            assert not (here / name).is_symlink()


@pytest.mark.parametrize("text", ["../../x", "a/b", "", "a\nb", "\x1b[31m", "x" * 100, "C:\\x"])
def test_ids_of_loggers_are_no_paths(text, tmp_path):
    from worldloom.files import remember

    (tmp_path / "run_id").write_text(text)
    assert said(remember, tmp_path / "run_id", lambda: "new")


# Printed texts ------------------------------------------------------------------------------------

WORDS = [
    "$(touch canary)",
    "`touch canary`",
    "a; touch canary",
    "a\ntouch canary\n",
    "a & touch canary",
    "a | touch canary",
    "a > canary",
    "'; touch canary; '",
    '"; touch canary; "',
    "\\'; touch canary",
    "a\rtouch canary",
    "\x1b[2K\x1b[31mred",
    "\x9b31m",
    "\u202etouch",
    "\u2066a",
    "\u200b",
    "-rf",
    "--config-dir=x",
    "!!",
    "~",
    "*",
    "{a,b}",
    "a b",
    "\ttab",
    "é",
    "\udcff",
    "#",
    "a\x00".strip("\0"),
    "\x07",
    "\x7f",
    "\u2028touch canary",
    "$'x'",
    "a\\",
    "",
]


@pytest.mark.parametrize("word", WORDS)
def test_printed_commands_are_what_bash_reads(word, tmp_path):
    """`python` is replaced by a function that shows its arguments."""
    config = {"model": {"_target_": "my.Model"}, "planner": {}, "env": {"_target_": "my.Env"}}
    config |= {"callbacks": {"a": {"_target_": word}}} if word else {}
    folder = f"runs/{word}"
    line = format_command("run", f"resume={folder}", config=config)
    assert line.isprintable()
    shown = subprocess.run(
        ["bash", "-c", 'python() { printf "%s\\0" "$@"; }\n' + line],
        cwd=tmp_path,
        capture_output=True,
    )
    words = os.fsdecode(shown.stdout).split("\0")[:-1]
    assert words[:3] == ["-m", "worldloom.run", f"resume={folder}"]
    assert "model._target_=my.Model" in words and not os.listdir(tmp_path)
    echoed = subprocess.run(["bash", "-c", f"printf %s {quote(word)}"], capture_output=True).stdout
    assert echoed == os.fsencode(word)
    assert escape(word).isprintable()


def test_a_run_in_a_folder_with_a_hostile_name(trained, here, commands):
    name = "a; touch canary; $(touch canary)'\x1b[31m"
    shutil.copytree(trained, here / name)
    done = commands.good(["resume=" + name], here)
    (line,) = re.findall("python -m worldloom.run .*", done["out"])
    shown = subprocess.run(
        ["bash", "-c", 'python() { printf "%s\\0" "$@"; }\n' + line], cwd=here, capture_output=True
    )
    assert shown.stdout.split(b"\0")[2] == f"resume={name}".encode()


def test_strings_of_files_do_not_reach_the_terminal(here, commands):
    bad = "\x1b]0;title\x07\u202e|<b>\nerror: run this: touch canary"
    runs = here / "runs"
    for seed in (1, 2):
        shutil.copytree(here / "hostile", runs / f"{seed}{bad.replace('/', '')}")
        (folder,) = runs.glob(f"{seed}*")
        change(folder, ("name", f"{seed}{bad}"), ("seed", seed), ("env/id", bad + str(seed)))
        (folder / "scores.yaml").unlink()
        (folder / "worldloom.log").write_text(f"error: {bad}\n")
    jobs = read_jobs([runs])
    rows = tabulate_jobs(jobs)
    lines = len(jobs) + 1
    assert len(write_table(rows).splitlines()) == lines
    assert len(write_csv(rows).splitlines()) == lines
    table = write_table(rows, markdown=True)
    assert len(table.splitlines()) == lines + 1 and "<b>" not in table
    for text in (write_table(rows), table, write_csv(rows), write_json({"jobs": rows})):
        assert text.replace("\n", "").isprintable()
    for module, words in (
        ("sweep", ["runs"]),
        ("sweep", ["runs", "format=csv"]),
        ("eval", [f"checkpoint={folder}"]),
        ("run", [f"resume={folder}", f"name={bad}"]),
        ("diagnose", [f"{folder}/checkpoints/{bad}"]),
    ):
        done = commands.run(words, here, module=f"worldloom.{module}")
        assert (done["out"] + done["err"]).replace("\n", "").isprintable(), (module, done)
        assert "\nerror: run this" not in done["out"] + done["err"], (module, done)


# Settings that no machine can have ----------------------------------------------------------------

HUGE = {
    "env/num_envs": 10**9,
    "env/image_size": 10**7,
    "env/frame_stack": 10**12,
    "env/workers": 50_000,
    "evaluation/num_envs": 10**9,
    "threads": 10**9,
}
TRAINING = {
    "model/deter": 16_000_000,
    "trainer/devices": 10**6,
    "model/imag_length": 10**12,
    "training/batch_size": 10**12,
    "training/sequence_length": 10**12,
    "data/capacity": 10**12,
    "model/blocks": 0,
    "model/dyn_layers": 10**9,
}


@pytest.mark.parametrize("key", HUGE)
def test_settings_beyond_any_memory(key, here):
    more = {"evaluation/num_envs": ("evaluation/episodes", 10**9)}
    more |= {"env/workers": ("env/num_envs", 50_000)}
    change(here / "hostile", *([more[key]] if key in more else []), (key, HUGE[key]))
    overrides = Overrides(("resume=hostile", "training.total_steps=48"))
    for call in (lambda: resume_arguments(overrides, here), lambda: load_run(here / "hostile")):
        message = reject(call, names="hostile/config.yaml")
        assert f"{key.rpartition('/')[2]}={HUGE[key]}" in message and "available" in message


@pytest.mark.parametrize(
    "key", ["model/deter", *(pytest.param(k, marks=SLOW) for k in TRAINING if k != "model/deter")]
)
def test_settings_of_training_beyond_any_memory(key, here, commands):
    change(here / "hostile", (key, TRAINING[key]))
    done = commands.run(["resume=hostile", "training.total_steps=48"], here, seconds=100)
    assert done["code"] == 1 and re.match("error: .*", done["err"]), done
    assert len(done["err"].splitlines()) == 1


def test_a_checkpoint_names_no_other_file(here):
    (here / "secret").write_bytes(b"x")
    files = BlockFiles(here / "hostile" / "checkpoints" / "replay")
    names = ["/dev/zero", "../../../secret", "0-000000-rows.bin/../../secret", "x"]
    assert files.find_damaged(dict.fromkeys(names, 0)) == names
