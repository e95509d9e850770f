"""Progress of a run: a bar in a terminal, otherwise a line every 20 seconds."""

import sys
import threading
import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

LOG_INTERVAL = 20.0  # seconds


class Progress(Callback):
    """Show environment steps, updates, steps/s, the last return and the remaining time.

    A thread prints the lines, so that they also appear during a long update or the prefill.
    """

    def __init__(self) -> None:
        self._done = threading.Event()
        self._bar: tqdm | None = None
        self._mark = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        position = self._position(data)
        self._mark = (time.monotonic(), position)
        self._done.clear()
        if sys.stderr.isatty():
            unit = " step" if data.collector is not None else " update"
            self._bar = tqdm(
                total=data.total_steps, initial=position, unit=unit, dynamic_ncols=True
            )
        threading.Thread(target=self._show, args=(data, self._bar), daemon=True).start()

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
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, data: Any, bar: tqdm | None) -> None:
        while not self._done.wait(LOG_INTERVAL if bar is None else 0.5):
            if bar is not None:
                bar.n = self._position(data)
                bar.set_postfix_str(self._postfix(data), refresh=True)
            else:
                print(self.line(data), flush=True)

    def line(self, data: Any) -> str:
        """Return one line of progress."""
        then, start = self._mark
        position = self._position(data)
        rate = (position - start) / max(time.monotonic() - then, 1e-9)
        left = (data.total_steps - position) / rate if rate else float("inf")
        unit = "env steps" if data.collector is not None else "updates"
        parts = [f"{unit} {position:,}/{data.total_steps:,}", self._postfix(data)]
        parts.append(f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s")
        parts.append(f"{_duration(left)} left")
        return " | ".join(parts)

    def _postfix(self, data: Any) -> str:
        if data.collector is None:
            return f"replay {len(data.buffer):,} rows"
        last = data.collector.last_return
        result = "none yet" if last is None else f"{last:.4g}"
        return f"updates {data.updates:,} | last return {result}"

    @staticmethod
    def _position(data: Any) -> int:
        return data.env_steps if data.collector is not None else data.updates


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"
