"""Tell the author of a world model, in plain words, what in it breaks the protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from worldloom.check.inference import check_inference
from worldloom.check.report import OPTIONAL, SIGNATURES, ProtocolError, Report, signature
from worldloom.check.saving import check_saving, left_as_it_was
from worldloom.check.training import check_training
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
    """Call every method of a world model with random data and report all that is wrong at once.

    Weights, buffers, gradients and modes of the model are left as they were. Parameters that get
    no gradient, and tensors that are neither parameter nor buffer, are only warned about: both
    may be meant.

    Args:
        model: the model, on the device that it shall be checked on.
        obs_shape: shape of an observation, or a dict of them (default: `model.obs_shape`); three
            axes mean uint8 images.
        action_dim: width of an action; with `discrete`, a tuple of sizes means several choices
            (default: `model.action_dim`).
        discrete: actions are one-hot (default: `model.discrete` where there is one, else False).
        batch_size: rows of random data, at least 2.
        length: time steps of random data, at least 3; unlike `batch_size`, so that exchanged
            axes show.

    Raises:
        ProtocolError: a ValueError with every finding, numbered: the method, what came back, what
            was expected and how to mend it.
    """
    if batch_size < 2 or length < 3:
        raise ValueError(
            f"batch_size is {batch_size} and length {length}; expected at least 2 rows and 3 "
            "steps, to tell rows and steps apart. Raise them"
        )
    _refuse_what_cannot_be_called(model)
    data = RandomData.for_model(model, obs_shape, action_dim, discrete, batch_size, length)
    report = Report(model, data)
    with data.seeded(), left_as_it_was(model):
        check_inference(report)
        check_training(report)
        check_saving(report)
    report.finish()


def _refuse_what_cannot_be_called(model: Any) -> None:
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(
            f"the class: {type(model).__name__} is no torch.nn.Module; expected one, so that it "
            "trains, moves and saves. Fix: inherit from torch.nn.Module and call "
            "super().__init__() first"
        )
    for name in SIGNATURES:
        if name not in OPTIONAL and not callable(getattr(model, name, None)):
            problems.append(f"{name}: it is missing; expected {signature(name)}. Fix: write it")
    if problems:
        raise ProtocolError(type(model).__name__, problems)
