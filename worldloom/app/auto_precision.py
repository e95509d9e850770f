"""`trainer.precision=auto`: chosen when a run starts, recorded with the run, and kept on resume.

config.yaml records `auto:bf16-mixed`, what was asked for and what was chosen in one value, so an
override of trainer.precision and another choice of trainer replace both. Everything that is built
from the configuration has the chosen precision.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from worldloom.app.launch import probe_trainer
from worldloom.app.saved_config import ResolvedConfig
from worldloom.protocol import count_parameters
from worldloom.ranks import Ranks
from worldloom.training.precision import AUTO, choose_precision, split_precision


def resolve_precision(
    config: ResolvedConfig, before: Mapping[str, Any], model: nn.Module, ranks: Ranks
) -> ResolvedConfig:
    """Return a configuration in which trainer.precision=auto is replaced by a precision.

    All processes call it and use what the first one chooses.

    before: the saved configuration of a run that is resumed, whose choice is kept, whatever this
        machine would choose; empty for a new run.
    """
    asked, chosen = split_precision(config.plain["trainer"].get("precision"))
    if asked != AUTO:
        return config
    if recorded := split_precision(before.get("trainer", {}).get("precision"))[1] or chosen:
        choice = recorded, "chosen when the run started"
    else:
        dtypes = (p.dtype for p in model.parameters() if p.requires_grad)
        dtype = next((dtype for dtype in dtypes if dtype != torch.float32), torch.float32)
        device = probe_trainer(config.plain["trainer"]).strategy.root_device
        choice = choose_precision(count_parameters(model), device, dtype)
    chosen, reason = ranks.gather(choice)[0]
    print(f"trainer.precision=auto is {chosen}: {reason}", flush=True)
    saved, plain = (
        {**held, "trainer": {**held["trainer"], "precision": precision}}
        for held, precision in ((config.saved, f"{AUTO}:{chosen}"), (config.plain, chosen))
    )
    return ResolvedConfig(saved, plain)
