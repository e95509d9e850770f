"""Saved models: model.safetensors and config.yaml, which contain nothing that could be executed."""

import hashlib
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import nn

from worldloom.files import (
    atomic_write,
    check_format,
    read_tensors,
    read_yaml,
    reject_interpolations,
    require_regular,
)
from worldloom.records import find_obstacle, find_tuples, is_plain, record_call, restore_tuples

# Version of the layout and names in saved models; raised whenever older files cannot be read.
FORMAT = 3
WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
# Names of dtypes in the safetensors format.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Tensors = dict[str, torch.Tensor]


class SavableModel(nn.Module):
    """A module that records the class and the arguments it was constructed with.

    The record (see `get_config`) names the class that was constructed, so a subclass is never saved
    as its base class.
    """

    build_config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Record the class and the arguments."""
        model = super().__new__(cls)
        # nn.Module is not initialised yet, so its __setattr__ is bypassed.
        vars(model)["build_config"] = record_call(cls, args, kwargs)
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.yaml; `create_world_model(folder)` loads them.

        Raises:
            ValueError: an argument of the constructor is not plain data.
        """
        save_model(self, folder)


def get_config(model: nn.Module) -> dict[str, Any] | None:
    """Return how to build a model again, {"model": name or path, "arguments": {...}}, or None.

    It is `model.build_config`, which `SavableModel` and the factory set. None if there is no such
    record, or if an argument is not plain data and so cannot be saved.
    """
    config = getattr(model, "build_config", None)
    return config if isinstance(config, dict) and is_plain(config) else None


def save_model(
    model: nn.Module, folder: str | Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model's config (see `get_config`) and its tensors, or other tensors for it.

    Each file is replaced atomically. Both contain an id of the config, so loading detects a crash
    between them, which is possible only if the folder held a model with another config. Warns if
    other programs cannot import the class.

    Raises:
        ValueError: the model has no config.
    """
    config, obstacle = get_config(model), find_obstacle(model)
    if config is None:
        raise ValueError(f"{type(model).__name__} cannot be saved: {obstacle}")
    if obstacle:
        warnings.warn(f"{folder}: {obstacle}", stacklevel=3)
    reject_interpolations(config, f"the config of {type(model).__name__}")
    id_ = hashlib.sha256(OmegaConf.to_yaml(config).encode()).hexdigest()[:16]
    # YAML has no tuples, so their places are listed.
    tuples = [list(path) for path in find_tuples(config["arguments"])]
    # As in `write_yaml`, the version comes last.
    text = OmegaConf.to_yaml({"id": id_, **config, "tuples": tuples, "format": FORMAT})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The config's file is complete before the weights are replaced, and replaced last.
    with atomic_write(folder / CONFIG) as file:
        file.write(text.encode())
        with atomic_write(folder / WEIGHTS) as weights:
            write_tensors(weights, model.state_dict() if tensors is None else tensors, id_)


def write_tensors(file: BinaryIO, tensors: Mapping[str, torch.Tensor], id_: str) -> None:
    """Write tensors in the safetensors format, one after another and so without a second copy.

    The format is the length of a JSON header (8 bytes), the header, padded to 8 bytes, and the
    bytes of all tensors. Large dtypes come first, so that every tensor is aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"id": id_, "crc32": _checksum(tensors)}}
    ordered = _order(tensors)
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype}, which cannot be saved; expected one of "
                f"{', '.join(map(str, DTYPES))}"
            )
        start, end = end, end + tensor.numel() * tensor.itemsize
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        file.write(_bytes(tensor))


def _order(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the CRC-32 of all tensors; the safetensors format has none."""
    crc = 0
    for _, tensor in _order(tensors):
        crc = zlib.crc32(_bytes(tensor), crc)
    return f"{crc:08x}"


def read_weights(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the tensors that a path refers to.

    path: a saved model's folder or a file in it, a checkpoint, or a run folder, of which the final
        model is read, or else the last checkpoint.
    """
    if path.is_file():
        path = path if path.suffix == ".ckpt" else path.parent
    inside = (path / "model", path / "checkpoints" / "last.ckpt")
    is_run = (path / "checkpoints").is_dir() and not (path / WEIGHTS).exists()
    path = next((found for found in inside if found.exists()), inside[1] if is_run else path)
    return (read_checkpoint if path.suffix == ".ckpt" else read_saved)(path)


def read_saved(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the tensors of a saved model.

    Raises:
        ValueError: a file is missing, damaged or of another format.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} contains no {name}; expected a folder written by save_pretrained, a run "
                "folder, a .ckpt file or official weights"
            )
    advice = "expected a model written by save_pretrained; copy it again, or save it again"
    config = read_yaml(folder / CONFIG, advice)
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} is not the config of a saved model; {advice}")
    fix = "load it with the version that wrote it, or train again"
    check_format(folder / CONFIG, config.pop("format", None), FORMAT, fix)
    try:
        require_regular(folder / WEIGHTS)
        with safe_open(folder / WEIGHTS, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("crc32", (crc := _checksum(tensors))) != crc:
            raise ValueError("the checksum of its tensors differs")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} cannot be read: {reason}; {advice}") from None
    if config.pop("id", None) != metadata.get("id"):
        raise ValueError(
            f"{folder / CONFIG} and {WEIGHTS} belong to different models, because saving was "
            f"interrupted; {advice}"
        )
    tuples = config.pop("tuples", None)
    if isinstance(tuples, list) and "arguments" in config:
        config["arguments"] = restore_tuples(config["arguments"], tuples)
    return config, tensors


def read_checkpoint(file: Path) -> tuple[dict[str, Any], Tensors]:
    """Return the model's config and tensors from a run's checkpoint, without executing code.

    Raises:
        ValueError: the file cannot be read, is not a checkpoint of a run, or contains
            interpolations.
    """
    try:
        checkpoint = read_tensors(file, mmap=True, verify=True)
        config = checkpoint["hyper_parameters"]["model"]
        state = {name: value for name, value in checkpoint["state_dict"].items()}
        if other := [name for name, value in state.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(f"{other[0]} is not a tensor")
    except Exception as error:
        spare = file.with_name("previous.ckpt")
        use = str(spare) if spare != file and spare.is_file() else "another one"
        raise ValueError(
            f"{file} is not a readable worldloom checkpoint: {describe_damage(file, error)}; "
            "nothing in it was executed. Expected a checkpoint written by python -m worldloom.run; "
            f"copy it again, or use {use}"
        ) from None
    reject_interpolations(config, file)
    prefix = "model."
    return config, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def describe_damage(file: Path, error: Exception) -> str:
    """Return a short reason why torch could not read a file."""
    if not file.exists():
        return "it does not exist"
    if file.is_file() and not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            start = opened.read(2)
        reasons = {b"PK": "it is truncated", b"": "it is empty"}
        return reasons.get(start, "it is a file of another kind")
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it would load {found[1]}"
    if isinstance(error, KeyError | TypeError):
        return f"it has no {error}" if isinstance(error, KeyError) else "it contains no dict"
    return " ".join(str(error).split())[:300]


def load_tensors(model: nn.Module, tensors: Tensors, source: Path) -> None:
    """Copy tensors into the model.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; nothing was copied.
    """
    state = model.state_dict()
    if missing := [name for name in state if name not in tensors]:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the model, first {missing[0]!r}"
        )
    if unknown := [name for name in tensors if name not in state]:
        raise ValueError(f"{source} has {len(unknown)} unknown tensors, first {unknown[0]!r}")
    for name, value in tensors.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"tensor {name!r} in {source} has shape {tuple(value.shape)}, expected "
                f"{tuple(state[name].shape)}"
            )
    same = all(value.dtype == state[name].dtype for name, value in tensors.items())
    # A model saved with another dtype is restored with it, bit for bit.
    model.load_state_dict(tensors, assign=not same)
