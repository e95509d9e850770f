"""Progress of a run: a bar in a terminal, otherwise a line every 20 seconds."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_INTERVAL = 20.0  # seconds
RATE_SECONDS = 60.0  # over which the rate is measured
BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


def print_line(text: str) -> None:
    """Print a line above the progress bar, if there is one."""
    with tqdm.external_write_mode():
        print(text, flush=True)


class Progress(Callback):
    """Show environment steps, updates, the mean return of the last 20 episodes, rate and time left.

    The rate is that of the last minute. A thread prints the lines, so that they also appear during
    a long update or the prefill.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._bar: tqdm | None = None
        self._marks: list[tuple[float, int]] = []  # times and positions of the last minute
        self._failed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        position = self._position(data)
        self._marks = [(time.monotonic(), position)]
        self._done.clear()
        with self._reporting():
            if sys.stderr.isatty():
                options: Any = {"initial": position, "bar_format": BAR, "dynamic_ncols": True}
                self._bar = tqdm(total=data.total_steps, **options)
        self._thread = threading.Thread(target=self._show, args=(data, self._bar), daemon=True)
        self._thread.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the thread."""
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the thread; Lightning does not call `teardown` after an error."""
        self._stop()

    def _stop(self) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bar is not None:
            with self._reporting():
                self._bar.close()
            self._bar = None

    def _show(self, data: Any, bar: tqdm | None) -> None:
        while not self._done.wait(LOG_INTERVAL if bar is None else 0.5):
            with self._reporting():
                if bar is not None:
                    bar.n = self._position(data)
                    bar.set_postfix_str(self._status(data), refresh=True)
                else:
                    print(self.line(data), flush=True)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Report the first error of the display, which must not stop a run."""
        try:
            yield
        except (Exception, SystemExit) as error:
            if not self._failed:
                self._failed = True
                log.warning("the progress cannot be shown (%r); the run continues", error)

    def line(self, data: Any) -> str:
        """Return one line of progress."""
        unit = "env steps" if data.collector is not None else "updates"
        return f"{unit} {self._position(data):,}/{data.total_steps:,} | {self._status(data)}"

    def _status(self, data: Any) -> str:
        parts = []
        if data.collector is not None:
            returns = data.collector.returns
            mean = f"{sum(returns) / len(returns):.4g}" if returns else "none yet"
            parts = [f"updates {data.updates:,}", f"return (last {len(returns) or 20}) {mean}"]
        rate = self._measure_rate(data)
        steps = max(data.total_steps - self._position(data), 0)  # the last steps may exceed total
        left = steps / rate if rate else float("inf") if steps else 0.0
        unit = "env steps" if data.collector is not None else "updates"
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
        return " | ".join([*parts, f"{_duration(left)} left"])

    def _measure_rate(self, data: Any) -> float:
        """Return steps per second since the newest mark of a minute ago, or since the start."""
        now, position = time.monotonic(), self._position(data)
        self._marks.append((now, position))
        while len(self._marks) > 2 and now - self._marks[1][0] >= RATE_SECONDS:
            del self._marks[0]
        then, start = self._marks[0]
        return (position - start) / max(now - then, 1e-9)

    @staticmethod
    def _position(data: Any) -> int:
        return data.env_steps if data.collector is not None else data.updates


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
