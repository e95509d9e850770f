"""Measure the time per update of a whole run beyond a bare training loop, alternating in a process.

usage: python experiments/overhead/overhead.py [updates=100] [rounds=5] [KEY=VALUE …]

KEY=VALUE are overrides of `python -m worldloom.run`: model=…, model.KEY=…, training.batch_size=….
The run is a real one, with its callbacks, loggers, data module and Lightning's trainer at their
defaults, on random vectors that were recorded before (nothing is collected). The bare loop calls
compute_loss, backward, step, zero_grad and after_update with the same model, optimiser and batches,
inside the stream of batches. A round consists of `updates` updates of each.

All figures are medians over the rounds, except for log and pictures, which occur only every
`training.log_every` updates or less often: these are means. Sampling and writing replay fields back
("sample") belong to both and are not included in the update.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hydra.utils import instantiate
from omegaconf import OmegaConf

from worldloom.app.build import OWN, prepare_process
from worldloom.app.compose import compose_config
from worldloom.app.data import build_data, open_task
from worldloom.protocol import Batch, split_result
from worldloom.timing import Timer, phase
from worldloom.training import WorldModelModule
from worldloom.training.datamodule import ReplayStream

OBS, ACTIONS, EPISODES, STEPS = 24, 6, 20, 500


class Turns:
    """Yield batches in rounds, with the same number of bare updates after each round.

    run, bare: seconds by phase of every round.
    """

    def __init__(self, data: Any, module: WorldModelModule, updates: int, rounds: int) -> None:
        self.data, self.module, self.updates, self.rounds = data, module, updates, rounds
        self.run: list[dict[str, float]] = []
        self.bare: list[dict[str, float]] = []

    def batches(self) -> Iterator[Batch]:
        """Replace the data module's stream; the first round is a warm-up."""
        for _ in range(self.rounds + 1):
            with Timer() as timer:
                yield from self._sampled()
                self.run.append(timer.flush())
            with Timer() as timer:
                self._bare()
                self.bare.append(timer.flush())
        self.data._stop()

    def _sampled(self) -> Iterator[Batch]:
        for _ in range(self.updates):
            yield from self.data._next_batch()

    def _bare(self) -> None:
        """Perform the same number of updates without the trainer."""
        model: Any = self.module.model
        optimizer: Any = self.module.optimizers(use_pl_optimizer=False)
        for batch in self._sampled():
            with phase("loss"):
                losses, replay = split_result(model.compute_loss(batch))
            with phase("backward"):
                losses["loss"].backward()
            with phase("optimizer"):
                optimizer.step()
                optimizer.zero_grad()
                if hasattr(model, "after_update"):
                    model.after_update()
            if replay:
                self.data.store_fields(batch, replay)


def record(folder: Path) -> None:
    """Write random episodes in the format of `data=offline`."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(EPISODES):
        np.savez(
            folder / f"{number:03}.npz",
            obs=rng.normal(size=(STEPS + 1, OBS)).astype(np.float32),
            actions=rng.uniform(-1, 1, (STEPS, ACTIONS)).astype(np.float32),
            rewards=rng.normal(size=STEPS).astype(np.float32),
            terminated=np.bool_(False),
            truncated=np.bool_(True),
        )


def measure(overrides: list[str], updates: int, rounds: int, folder: Path) -> Turns:
    """Train like `worldloom.run`, alternating with the bare loop; return the times of both."""
    record(folder / "data")
    offline = ["data=offline", f"data.path={folder / 'data'}", "env=none", "~experiment"]
    cfg = compose_config(*offline, f"folder={folder / 'run'}", *overrides)
    prepare_process(cfg.seed, cfg.threads)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    task, dataset = open_task(plain)
    model: Any = task.build_model(plain["model"])
    actor = task.build_actor(model, plain["planner"], plain["trainer"]["precision"])
    data = build_data(plain, task, actor, dataset)
    module = WorldModelModule(
        model,
        instantiate(cfg.optimizer),
        log_every=cfg.training.log_every,
        config=plain,
        folder=Path(cfg.folder),
    )
    turns = Turns(data, module, updates, rounds)
    data.train_dataloader = lambda: ReplayStream(turns.batches)
    own = {key: value for key, value in cfg.trainer.items() if key not in OWN}
    trainer = instantiate(
        own,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        callbacks=[instantiate(callback) for callback in cfg.callbacks.values() if callback],
    )
    trainer.fit(module, datamodule=data)
    return turns


def main() -> None:
    """Run the command line."""
    numbers = {"updates": 100, "rounds": 5}
    overrides = [word for word in sys.argv[1:] if word.partition("=")[0] not in numbers]
    numbers |= {
        w.partition("=")[0]: int(w.partition("=")[2]) for w in sys.argv[1:] if w not in overrides
    }
    with TemporaryDirectory() as folder:
        turns = measure(overrides, **numbers, folder=Path(folder))
    report(overrides, numbers["updates"], turns)


def report(overrides: list[str], updates: int, turns: Turns) -> None:
    """Print milliseconds per update for each phase, without the first round."""
    print(*overrides, f"({turns.rounds} rounds of {updates} updates; ms per update)")
    print(f"{'':<14}{'run':>10}{'bare':>10}{'run - bare':>12}{'error':>10}")
    names = list(dict.fromkeys(name for spent in turns.run + turns.bare for name in spent))
    for name in [*names, None]:
        middle = np.mean if name in ("log", "pictures") else np.median
        run, bare = (_ms(rounds[1:], name, updates) for rounds in (turns.run, turns.bare))
        error = (run - bare).std(ddof=1) / len(run) ** 0.5
        shown = [middle(x) for x in (run, bare, run - bare)]
        print("{:<14}{:10.3f}{:10.3f}{:12.3f}{:10.3f}".format(name or "update", *shown, error))
    print(f"overhead: {shown[2]:.3f} ms, {shown[2] / shown[1]:.1%} of the bare update")


def _ms(rounds: list[dict[str, float]], name: str | None, updates: int) -> np.ndarray:
    """Return ms per update of a phase in every round; None for all phases but sampling."""
    own = [{k: v for k, v in spent.items() if k != "sample"} for spent in rounds]
    spent = [x.get(name, 0.0) for x in rounds] if name else [sum(x.values()) for x in own]
    return np.array(spent) * 1e3 / updates


if __name__ == "__main__":
    main()
