"""Time updates and decisions of a model, next to this machine's matrix-product rate.

usage: worldloom bench [model=dreamerv3:size1m] [model.KEY=VALUE ...]
       [model._target_=my_pkg.Mine +model.KEY=VALUE ...] [batch=...] [length=...]
       [obs=24 | obs=3,64,64] [actions=6] [discrete=false] [envs=16] [repeats=5] [threads=...]
       [device=cpu] [precision=32-true | precision=bf16-mixed] [matrix=2048]

Updates and decisions are computed as in a run with that trainer.precision: with bf16-mixed on a
CPU, TD-MPC2 plans in mixed bfloat16, and other models act in float32.

Batch size, sequence length, optimiser and train ratio are those of the model's preset. Each figure
is the time of single calls; "update" is the sum of the phases listed below it:

  world model, imagine, heads   parts of compute_loss that the model marks (worldloom.timing)
  loss                          the rest of compute_loss; all of it in a model without marks
  backward, optimizer           the optimiser's step, zero_grad and the model's after_update
  collect                       decisions per update at the preset's train ratio, one environment
                                (`worldloom check` times the environment's steps)
  sample                        drawing a batch from a replay in memory, writing fields back
  log                           writing all metrics, divided by training.log_every
  policy                        one decision, from observations to actions, of 1 and `envs` at once

"floor" is the number of floating-point operations of an update (matrix products and convolutions)
divided by the rate of a large matrix product; "share" is floor / median update. Both are measured
in turns, so that other load slows down both. Peak memory on a CPU is that of the whole process.
"""

import torch

from worldloom.app.command_line import run_command
from worldloom.app.compose import Overrides, key_of
from worldloom.bench.measure import measure, read_settings
from worldloom.nn.products import chosen_library


def bench_command(overrides: Overrides) -> None:
    """Measure as the command line describes, and print the table."""
    config, hyperparameters = read_settings(overrides.args)
    torch.set_num_threads(config.threads)
    table = measure(config, **hyperparameters).table()
    model = (arg for arg in overrides if key_of(arg).startswith("model."))
    print(*(f"{key}={value}" for key, value in vars(config).items()), *model)
    print("float32 products by {} ({})".format(*chosen_library()))
    print(table)


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), bench_command, needs_arguments=False)


if __name__ == "__main__":
    main()
