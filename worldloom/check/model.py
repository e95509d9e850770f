"""`check_world_model`: report every way in which a model breaks the WorldModel protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from worldloom.check.inference import check_inference
from worldloom.check.report import ProtocolError, Report
from worldloom.check.saving import check_record, check_saving, preserve_model
from worldloom.check.training import check_training
from worldloom.protocol import find_missing_methods, format_signature
from worldloom.random_batches import RandomData


def check_world_model(
    model: Any,
    obs_shape: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    action_dim: int | Sequence[int] | None = None,
    *,
    discrete: bool | None = None,
    batch_size: int = 3,
    length: int = 5,
) -> None:
    """Call every method of a world model with random data and report all problems at once.

    Weights, buffers, gradients and modes of the model are restored. Parameters without a gradient,
    and tensors that are neither parameters nor buffers, only cause warnings, because both may be
    intended.

    Args:
        model: the model, on the device on which it is checked.
        obs_shape: shape of an observation, or a dict of shapes (default: `model.obs_shape`); three
            axes mean uint8 images.
        action_dim: width of an action; with `discrete`, a tuple of sizes means several choices
            (default: `model.action_dim`).
        discrete: whether actions are one-hot (default: `model.discrete` if it exists, else False).
        batch_size: rows of random data, at least 2.
        length: time steps of random data, at least 3; different from `batch_size`, so that
            exchanged axes are detected.

    Raises:
        ProtocolError: a ValueError with all findings, numbered: the method, what it returned, what
            was expected and how to fix it.
    """
    if batch_size < 2 or length < 3:
        raise ValueError(
            f"batch_size is {batch_size} and length {length}; expected at least 2 rows and 3 "
            "steps, so that mixed-up axes are detected. Increase them"
        )
    _require_methods(model)
    data = RandomData.for_model(model, obs_shape, action_dim, discrete, batch_size, length)
    report = Report(model, data)
    with data.seeded(), preserve_model(model):
        check_inference(report)
        check_training(report)
        check_saving(report)
        check_record(report)
    report.finish()


def _require_methods(model: Any) -> None:
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(
            f"the class: {type(model).__name__} is not a torch.nn.Module; expected one, so that it "
            "can be trained, moved and saved. Fix: inherit from torch.nn.Module and call "
            "super().__init__() first"
        )
    for name in find_missing_methods(model):
        expected = format_signature(name)
        problems.append(f"{name}: the method is missing; expected {expected}. Fix: add it")
    if problems:
        raise ProtocolError(type(model).__name__, problems)
