"""Begin with what another model has learned: copy every tensor that fits, and say what did not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from worldloom.factory import REGISTERED, import_target, official_format
from worldloom.saving import read_weights


@dataclass
class Transfer:
    """What `transfer` did.

    matched: names of the model's tensors that were copied.
    skipped: {name: why} of those that keep their initial values.
    unused: names of tensors that only the file has.
    """

    matched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Return a few lines: how much of each part matched, and each tensor that did not."""
        total = len(self.matched) + len(self.skipped)
        lines = [f"{len(self.matched)} of {total} tensors taken over:"]
        parts: dict[str, list[int]] = {}
        for name in (*self.matched, *self.skipped):
            part = parts.setdefault(name.split(".")[0], [0, 0])
            part[0] += name not in self.skipped
            part[1] += 1
        lines += [f"  {name:<16}{taken} of {count}" for name, (taken, count) in parts.items()]
        lines += [f"  skipped {name}: {why}" for name, why in self.skipped.items()]
        if self.unused:
            lines.append(f"  only in the file: {', '.join(self.unused)}")
        return "\n".join(lines)


@torch.no_grad()
def transfer(model: nn.Module, path: str | Path) -> Transfer:
    """Copy tensors of the same name and shape from saved or official weights into a model.

    path: as for `create_world_model`: a folder written by save_pretrained, a run folder, a .ckpt
        file, or official weights.

    Raises:
        ValueError: there is nothing at the path, it cannot be read, or nothing in it fits.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise ValueError(f"init_from: no file or folder {str(path)!r}; check the path")
    tensors = _tensors(model, source)
    result = Transfer(unused=sorted(tensors.keys() - model.state_dict().keys()))
    for name, own in model.state_dict().items():
        if name not in tensors:
            result.skipped[name] = "not in the file"
        elif tensors[name].shape != own.shape:
            shapes = tuple(tensors[name].shape), tuple(own.shape)
            result.skipped[name] = f"{shapes[0]} in the file, {shapes[1]} in the model"
        else:
            own.copy_(tensors[name])
            result.matched.append(name)
    if not result.matched:
        name, why = next(iter(result.skipped.items()))
        raise ValueError(
            f"init_from: nothing in {path} fits {type(model).__name__} (first {name!r}: {why}); "
            "expected weights of the same family of models"
        )
    return result


def _tensors(model: nn.Module, source: Path) -> Mapping[str, Tensor]:
    """Read all tensors of a file under the names of our model."""
    module = official_format(source)
    if module is None:
        return read_weights(source)[1]
    family = module.__name__.split(".")[-2]
    if not isinstance(model, import_target(REGISTERED[family])):
        raise ValueError(
            f"init_from: {source} holds official weights of {family}, but the model is a "
            f"{type(model).__name__}; expected weights of the same family of models"
        )
    return module.renamed(model, module.read_arrays(source))
