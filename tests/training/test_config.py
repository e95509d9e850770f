import re
from dataclasses import fields

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from worldloom.training import TrainingConfig
from worldloom.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    parse_interval,
)


def test_as_the_documentation_makes_it():
    config = TrainingConfig(
        total_steps=50000,
        batch_size=16,
        sequence_length=50,
        learning_rate=3e-4,
        grad_clip=100.0,
    )
    assert (config.total_steps, config.sequence_length, config.grad_clip) == (50000, 50, 100.0)
    assert config.train_ratio == 32.0 and config.prefill is None


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("total_steps", 0, "total_steps is 0; expected at least 1"),
        ("batch_size", -1, "batch_size is -1; expected at least 1"),
        ("sequence_length", 1, "sequence_length is 1; expected at least 2"),
        ("learning_rate", 0.0, "learning_rate is 0.0; expected a finite number above 0"),
        ("learning_rate", float("nan"), "learning_rate is nan; expected a finite number above 0"),
        ("grad_clip", 0.0, "grad_clip is 0.0; expected a finite number above 0, or null"),
        ("train_ratio", -1.0, "train_ratio is -1.0; expected a finite number above 0, or null"),
        ("seed_episodes", -1, "seed_episodes is -1; expected at least 0"),
        ("prefill", 0, "prefill is 0; expected at least 1, or null for a batch"),
        ("prefill_counts", "rows", "prefill_counts is 'rows'; expected steps or starts"),
        ("random_steps", -1, "random_steps is -1; expected at least 0"),
        ("log_every", 0, "log_every is 0; expected at least 1"),
    ],
)
def test_impossible_training(setting, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("episodes", 0, "episodes is 0; expected at least 1"),
        ("episodes_during", 0, "episodes_during is 0; expected at least 1"),
        ("num_envs", -2, "num_envs is -2; expected at least 1"),
        ("every", -1, "every is -1; expected at least 0"),
    ],
)
def test_impossible_evaluation(setting, value, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"), [("batch_size", "many"), ("batch_size", 2.5), ("learning_rate", "fast")]
)
def test_as_a_schema_it_refuses_wrong_types(setting, value):
    schema = OmegaConf.structured(TrainingConfig)
    with pytest.raises(ValidationError, match=f"(?s){value}.*could not be converted"):
        schema[setting] = value
    schema.train_ratio = 3  # an integer is a number too
    assert schema.train_ratio == 3.0


@pytest.mark.parametrize("cls", [TrainingConfig, EvaluationConfig, CheckpointConfig])
def test_every_setting_is_explained(cls):
    for name in [field.name for field in fields(cls)]:
        assert re.search(rf"^ *{name}: ", cls.__doc__ or "", re.MULTILINE), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10min", (10.0, 0)),
        ("0.5 minutes", (0.5, 0)),
        ("1 minute", (1.0, 0)),
        ("500updates", (float("inf"), 500)),
        (" 1 update ", (float("inf"), 1)),
    ],
)
def test_an_interval_is_a_time_or_a_number_of_updates(text, expected):
    assert parse_interval(text) == expected


@pytest.mark.parametrize("text", ["10", 10, "ten minutes", "0min", "0 updates", "1.5updates", ""])
def test_another_interval_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=r"every is .*checkpoint.every=10min"):
        parse_interval(text)
