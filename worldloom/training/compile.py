"""Compiled networks: `torch.compile` for the layers of a model, but not for its loops over time.

Compiling a whole loss unrolls its loops, which takes minutes. Networks compile in seconds and keep
their names in checkpoints.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Random numbers are drawn as without compilation, so that dropout stays the same.
OPTIONS: dict[str, Any] = {"fallback_random": True}


def compile_networks(model: nn.Module) -> list[str]:
    """Compile the networks of a model in place, each at its first call; return their names.

    A network is an outermost submodule that is called as a function. Methods of other names, such
    as those of an RSSM, stay as they are.

    Raises:
        ValueError: nothing can be compiled on this machine.
    """
    device = next(model.parameters()).device
    try:
        torch.compile(lambda x: x + 1, options=OPTIONS)(torch.zeros(2, device=device))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"trainer.compile is on, but torch.compile fails on this machine: {reason}; install a "
            "C++ compiler (and Triton for a GPU), or set trainer.compile=off"
        ) from error
    names = []
    for name, network in _find_networks(model):
        network.compile(dynamic=False, options=OPTIONS)
        names.append(name)
    return names


def _find_networks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost submodules that have a `forward`, with their names."""
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward or isinstance(child, nn.ModuleList):
            yield from _find_networks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child
