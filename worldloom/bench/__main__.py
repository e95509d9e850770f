"""Time whole updates of a model, and its acting, beside what this machine can multiply.

usage: python -m worldloom.bench [--grow] [model=dreamerv3:size1m] [model.KEY=VALUE …] [batch=…]
       [length=…] [obs=24 | obs=3,64,64] [actions=6] [discrete=false] [envs=16] [repeats=5]
       [threads=…] [device=cpu] [matrix=2048]

The batch, its optimiser and how often a run trains are those of the model's preset. All figures are
of single calls; "update" is the sum of the phases below it:

  world model, imagine, heads   of compute_loss, where the model marks them (worldloom.timing)
  loss                          what else compute_loss does: everything, in a model without marks
  backward, optimizer           the optimiser's step, zero_grad and the model's after_update
  collect                       beside it: the decisions that an update is owed, one environment's;
                                the environment's own steps are in `python -m worldloom.envs.check`
  sample                        drawing a batch from a replay in memory, writing latents back
  log                           an update's share of writing all metrics every training.log_every
  policy                        one decision, from observations to actions, of 1 and `envs` at once

The floor of an update is its floating-point operations (matrix products and convolutions) at the
rate of a large matrix product; its share is floor / median. Both are measured turn by turn, so that
other load slows both down. Peak memory on a CPU is the whole process's, with torch itself.

--grow prints instead how milliseconds grow with the batch, the length, the horizon of imagination
or planning, the size (up to five presets of the family) and the number of environments, each over
four doublings or more, with the fitted exponent: 1 is linear. What costs the same at any size
flattens the small ones, so "last" has the exponent of the last step alone. Batch and length go from
an eighth of the preset's (or of batch= and length=) to twice of it; where every case is a model of
its own, an eighth of the batch is used.
"""

import sys
from typing import Any

import torch
from omegaconf import OmegaConf

from worldloom.app.compose import readable_errors
from worldloom.app.validation import checked_section
from worldloom.bench.growth import grow, growth_table
from worldloom.bench.measure import BenchConfig, measure
from worldloom.memory import keep_freed_memory


def main() -> None:
    """Run the command line."""
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    keep_freed_memory()
    with readable_errors():
        words = [word for word in sys.argv[1:] if word != "--grow"]
        own = [word for word in words if not word.startswith("model.")]
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(own))
        config = checked_section("", given, BenchConfig)
        torch.set_num_threads(config.threads)
        model = [word.removeprefix("model.") for word in words if word not in own]
        overrides: Any = OmegaConf.to_container(OmegaConf.from_cli(model))
        grows = len(words) < len(sys.argv) - 1
        if grows:
            table = growth_table(grow(config, **overrides))
        else:
            table = measure(config, **overrides).table()
    print(*(f"{k}={v}" for k, v in vars(config).items()), *(f"model.{word}" for word in model))
    print(table)


if __name__ == "__main__":
    main()
