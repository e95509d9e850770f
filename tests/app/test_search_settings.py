"""The settings of a search: spaces, samplers and pruners, the journal, and the command line."""

import inspect
import json
import math
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from worldloom.app.compose import Overrides, compose_config
from worldloom.app.search_config import SearchConfig
from worldloom.app.search_space import Choices, Range, format_override, parse_space
from worldloom.app.sweep_names import name_sweep

optuna = pytest.importorskip("optuna")

from worldloom.app.samplers import (  # noqa: E402
    UNUSABLE,
    count_trials,
    make_pruner,
    make_sampler,
    read_search,
)
from worldloom.app.study import JOURNAL, Study  # noqa: E402

SPACE = {
    "training": {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
    "model": {"horizon": {"low": 1, "high": 9, "step": 2}},
    "model.units": {"choices": [[1, 2], "auto", None, 16]},
}


def test_spaces_are_nested_or_have_dotted_keys():
    space = parse_space(SPACE)
    assert space == {
        "training.learning_rate": Range(1e-4, 1e-2, log=True),
        "model.horizon": Range(1, 9, step=2),
        "model.units": Choices(([1, 2], "auto", None, 16)),
    }
    assert space["model.horizon"].list_values() == [1, 3, 5, 7, 9]
    assert space["training.learning_rate"].list_values() is None
    assert Range(0.0, 0.3, step=0.1).list_values() == pytest.approx([0, 0.1, 0.2, 0.3])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [
        {key: part.suggest(trial, key) for key, part in space.items()}
        for trial in (study.ask() for _ in range(50))
    ]
    assert {values["model.horizon"] for values in drawn} == {1, 3, 5, 7, 9}
    assert {str(values["model.units"]) for values in drawn} == {"[1, 2]", "auto", "None", "16"}
    assert all(1e-4 <= values["training.learning_rate"] <= 1e-2 for values in drawn)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ([1, 2], "search.space.x is [1, 2]; expected {low: 1e-4"),
        ({"y": [1, 2]}, "search.space.x.y is [1, 2]; expected {low: 1e-4"),
        (3, "search.space.x is 3; expected {low: 1e-4"),
        ({"low": 1}, "search.space.x has no high"),
        ({"low": 1, "hihg": 2}, "unknown key 'search.space.x.hihg' (did you mean"),
        ({"low": 2, "high": 1}, "search.space.x is {low: 2, high: 1}; expected low < high"),
        ({"low": "a", "high": 1}, "search.space.x.low is 'a'; expected a number"),
        ({"low": True, "high": 2}, "search.space.x.low is true; expected a number"),
        ({"low": 0, "high": math.inf}, "search.space.x.high is inf; expected a number"),
        ({"low": 0, "high": 1, "log": True}, "low is 0; expected more than 0 with log: true"),
        ({"low": 0, "high": 1, "log": "yes"}, "log is 'yes'; expected true or false"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, "step is 1; expected none with log"),
        ({"low": 0, "high": 1, "step": -1}, "step is -1; expected more than 0"),
        ({"low": 0, "high": 10, "step": 3}, "expected a step that leads from low to high exactly"),
        ({"choices": [1]}, "search.space.x.choices is [1]; expected at least two values"),
        ({"choices": [1, 2, 1]}, "search.space.x.choices has 1 twice"),
        ({"choices": [1, 2], "low": 1}, "search.space.x has choices and low; leave one"),
    ],
)
def test_impossible_spaces_are_named(node, message):
    with pytest.raises(ValueError) as error:
        parse_space({"x": node})
    assert message in str(error.value)


def test_a_setting_cannot_be_in_a_space_twice():
    part = {"low": 0, "high": 1}
    with pytest.raises(ValueError, match=r"search.space has a.b twice"):
        parse_space({"a": {"b": part}, "a.b": part})


@pytest.mark.parametrize(
    "value",
    [
        *(1, -2.5, 1e-5, None, True, "auto", "it's, 'x'", "true", "007", "a b", [1, [2.0, "x"]]),
        *("C:\\data\\", "a\\'b", "läuft"),
    ],
)
def test_drawn_values_reach_the_runs_unchanged(value):
    (override,) = OverridesParser.create().parse_overrides([f"key={format_override(value)}"])
    found = override.value()
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"space": {}}, "search.space is empty; add a setting to vary, such as 'search.space."),
        ({"trails": 3}, "unknown key 'search.trails' (did you mean 'search.trials'?)"),
        ({"trials": 0}, "search.trials is 0; expected at least 1"),
        ({"trials": 2.5}, "search.trials is 2.5; expected a whole number"),
        ({"direction": "max"}, "search.direction is 'max'; expected maximize or minimize"),
        ({"sampler": "TPE"}, "search.sampler is 'TPE' (did you mean 'TPESampler'?); expected one"),
        ({"sampler": "RandmSampler"}, "(did you mean 'RandomSampler'?)"),
        ({"pruner": "Median"}, "search.pruner is 'Median' (did you mean 'MedianPruner'?)"),
        (
            {"sampler": {"name": "TPESampler", "n_startup": 3}},
            "'search.sampler.n_startup' (did you mean 'search.sampler.n_startup_trials'?)",
        ),
        ({"sampler": {"name": "TPESampler", "seed": 3}}, "write search.seed=…"),
        ({"sampler": {"name": "TPESampler", "gamma": 3}}, "gamma takes a Python object"),
        ({"sampler": {"name": "NSGAIISampler", "crossover": "x"}}, "takes a Python object"),
        ({"sampler": "CmaEsSampler"}, "never runs code from a folder; use GPSampler"),
        ({"sampler": "GridSampler"}, "search.space.training.learning_rate is {low: 0.0001"),
        ({"pruner": "PercentilePruner"}, "search.pruner: "),
        ({"pruner": {"name": "PercentilePruner", "percentile": 200.0}}, "search.pruner: "),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        read_search({"space": SPACE, **settings})
    assert message in str(error.value)


def test_every_other_sampler_and_pruner_of_optuna_can_be_chosen():
    finite = {"x": {"choices": [1, 2, 3]}, "y": {"low": 0, "high": 1}}
    names = {name for name in optuna.samplers.__all__ if name.endswith("Sampler")}
    for name in sorted(names - {"BaseSampler", "BaseGASampler", *UNUSABLE}):
        if name == "GPSampler":
            pytest.importorskip("scipy")
        read_search({"space": finite, "sampler": name})
    pruners = {"PercentilePruner": {"percentile": 25.0}, "ThresholdPruner": {"lower": 0.0}}
    pruners["PatientPruner"] = {"wrapped_pruner": "MedianPruner", "patience": 2}
    for name in {name for name in optuna.pruners.__all__ if name != "BasePruner"}:
        pruner = make_pruner(SearchConfig(pruner={"name": name, **pruners.get(name, {})}))
        assert type(pruner).__name__ == name
    settings = SearchConfig(space=finite, sampler="GridSampler", trials=20)
    assert count_trials(settings) == 6 and count_trials(SearchConfig(space=finite)) == 20


def test_samplers_that_unpickle_the_journal_cannot_be_chosen():
    classes = [getattr(optuna.samplers, name) for name in optuna.samplers.__all__]
    unsafe = {
        cls.__name__
        for cls in classes
        if inspect.isclass(cls) and "pickle.loads" in Path(inspect.getfile(cls)).read_text()
    }
    assert unsafe and unsafe <= UNUSABLE.keys()


def draws(folder, settings, count, studies=1):
    """Values of trials that several processes ask for in turn, each after the last one."""
    opened = [Study(folder, settings) for _ in range(studies)]
    return [opened[index % studies].ask()[1] for index in range(count)]


@pytest.mark.parametrize("sampler", ["RandomSampler", "GridSampler"])
def test_neither_continuing_nor_several_processes_change_the_draws(tmp_path, sampler):
    space = {"x": {"low": 0.0, "high": 1.0, "step": 0.125}, "y": {"choices": [*"abcdefgh"]}}
    settings = read_search({"space": space, "sampler": sampler, "seed": 7})
    for name in "abc":
        (tmp_path / name).mkdir()
    whole = draws(tmp_path / "a", settings, 12)
    assert draws(tmp_path / "b", settings, 12, studies=3) == whole
    for start in range(0, 12, 4):
        assert draws(tmp_path / "c", settings, 4) == whole[start : start + 4]
    assert len({str(values) for values in whole}) > 9
    other = read_search({"space": space, "sampler": sampler, "seed": 8})
    (tmp_path / "d").mkdir()
    assert draws(tmp_path / "d", other, 12) != whole


def test_the_random_numbers_of_a_sampler_depend_on_the_seed_and_the_trial():
    def draw(number, seed):
        settings = SearchConfig(space={"x": {"low": 0.0, "high": 1.0}}, seed=seed)
        study = optuna.create_study(sampler=make_sampler(settings, number))
        return study.ask().suggest_float("x", 0.0, 1.0)

    assert draw(3, 0) == draw(3, 0) and len({draw(n, s) for n in range(5) for s in range(5)}) == 25


def test_damaged_journals(tmp_path):
    settings = read_search({"space": SPACE, "sampler": "RandomSampler"})
    first = draws(tmp_path, settings, 3)
    file = tmp_path / JOURNAL
    whole = file.read_bytes()
    for cut in range(1, 40, 7):  # a full disk
        file.write_bytes(whole[:-cut])
        again = draws(tmp_path, settings, 1)
        assert len(Study(tmp_path, settings).list_trials()) == 4 and again != first[:1]
    for text in (b"{\n{}\n", b"[1]\n[2]\n", whole + b'{"op_code": 77}\n', b"\x80\x04.\n\n"):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=f"{JOURNAL} is not a journal of Optuna"):
            Study(tmp_path, settings)


def test_values_of_a_journal_from_elsewhere_are_numbers_or_choices(tmp_path):
    """The choices are those of the command line, whatever the journal says."""
    settings = read_search({"space": {"x": {"choices": ["a", "b"]}}, "sampler": "RandomSampler"})
    draws(tmp_path, settings, 1)
    file = tmp_path / JOURNAL
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[-1]["distribution"] = lines[-1]["distribution"].replace('"a"', '"c"')
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study = Study(tmp_path, settings)
    with pytest.raises(ValueError):
        study.resume(study.list_trials("RUNNING")[0])


def test_names_of_searches():
    assert name_sweep(["-m", "search=tdmpc2", "search.trials=9", "env.task=x"]) == "x-search_tdmpc2"
    words = ["-m", "+search.space.training.learning_rate={low: 1e-4, high: 1e-2}", "seed=0,1"]
    assert name_sweep([*words, "search.sampler=GPSampler"]) == "seed-learning_rate"


def test_search_needs_m_and_implies_its_defaults():
    with pytest.raises(ValueError, match=r"search=tdmpc2 makes a search, .* add -m"):
        Overrides(("search=tdmpc2",)).with_implied()
    implied = Overrides(("-m", "search.trials=3", "sweep=x")).with_implied().args
    assert implied == ("-m", "search.trials=3", "sweep=x", "search=default")
    added = Overrides(("-m", "search.space.a.b={low: 1, high: 2}", "search.space.a.b.low=0"))
    assert {"++search.space.a.b={low: 1, high: 2}", "search.space.a.b.low=0"} <= {
        *added.with_implied().args
    }


@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2"])
def test_spaces_in_conf_belong_to_their_family(name):
    cfg = compose_config(f"search={name}", f"model={name}_tiny")
    settings = read_search(OmegaConf.to_container(cfg.search))
    assert len(settings.parse_space()) >= 3 and settings.trials == 20
    for key in settings.parse_space():
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert isinstance(node, int | float | None)
