"""Models on disk: model.safetensors and config.yaml, and nothing that can run code."""

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


def config_of(model: nn.Module) -> dict[str, Any] | None:
    """Return what tells how to build a model, {"model": name or path, **arguments}, if known.

    It is the model's own `config`, or `build_config`, which the factory sets where a model has none
    or uses that name for something else.
    """
    for config in (getattr(model, "config", None), getattr(model, "build_config", None)):
        if isinstance(config, dict) and "model" in config:
            return config
    return None


def save_model(
    model: nn.Module, folder: str | Path, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model's tensors, or others for it, and how to build it (see `config_of`).

    Each file is written under a temporary name and then renamed, so a crash leaves no half file.
    """
    config = config_of(model)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} has no config that tells how to build it; create it with "
            "create_world_model or set model.config = {'model': 'my_pkg.MyModel', **arguments}"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict() if tensors is None else tensors
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        # The format refuses tensors that share memory, such as tied weights.
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in stored else tensor
        stored.add(memory)
    try:
        save_file(tensors, folder / f".{WEIGHTS}")
    except SafetensorError as error:  # a full disk, for example
        raise OSError(f"{folder / WEIGHTS} could not be written: {error}") from None
    text = OmegaConf.to_yaml(OmegaConf.create({"format": FORMAT, **_plain(config)}))
    (folder / f".{CONFIG}").write_text(text)
    for name in (WEIGHTS, CONFIG):
        os.replace(folder / f".{name}", folder / name)


def read_weights(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config and the tensors of what a path means.

    That is a saved model's folder or a file in it, a checkpoint, or of a run's folder the final
    model, or else its last checkpoint.
    """
    if path.is_file():
        path = path if path.suffix == ".ckpt" else path.parent
    inside = (path / "model", path / "checkpoints" / "last.ckpt")
    path = next((found for found in inside if found.exists()), path)
    return (read_checkpoint if path.suffix == ".ckpt" else read_saved)(path)


def read_saved(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the config and the tensors of a saved model.

    Raises:
        ValueError: a file is missing, damaged or of a newer format.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} holds no {name}; expected a folder written by save_pretrained, a run "
                "folder, a .ckpt file or official weights"
            )
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the model in {folder} cannot be read: {reason}; expected what save_pretrained wrote; "
            "copy it again"
        ) from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        held = config.get("format") if isinstance(config, dict) else None
        raise ValueError(
            f"{folder / CONFIG} is not a saved worldloom model of format {FORMAT}: it has the "
            f"format {held!r}; a newer worldloom may read it"
        )
    del config["format"]
    return config, tensors


def read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the model's config and tensors out of a run's checkpoint, without running code."""
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        config = checkpoint["hyper_parameters"]["model"]
        state = checkpoint["state_dict"]
    except Exception as error:
        raise ValueError(
            f"{file} is not a readable worldloom checkpoint: {damage(file, error)}; nothing in it "
            "was run. Expected one that python -m worldloom.run wrote; copy it again, or take "
            "another"
        ) from None
    prefix = "model."
    return config, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def damage(file: Path, error: Exception) -> str:
    """Say in a few words why torch could not read a file."""
    if not zipfile.is_zipfile(file):
        start = file.read_bytes()[:2] if file.is_file() else b""
        kinds = {b"PK": "it was cut off", b"": "it is empty"}
        return kinds.get(start, "it holds something else")
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it wants to load {found[1]}"
    if isinstance(error, KeyError | TypeError):
        return f"it has no {error}" if isinstance(error, KeyError) else "it holds no dict"
    return " ".join(str(error).split())[:300]


def load_tensors(model: nn.Module, tensors: dict[str, torch.Tensor], source: Path) -> None:
    """Copy tensors into the model; name the first that is missing, unknown or misshapen."""
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
    # A model saved in another precision comes back in it, bit for bit.
    model.load_state_dict(tensors, assign=not same)


def _plain(value: Any) -> Any:
    """Turn tuples into lists and mappings into dicts, as YAML knows them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value
