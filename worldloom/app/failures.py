"""What the processes of a run do when one of them fails: they find out which, say so, and end."""

import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from worldloom.app.command_line import USER_ERRORS, explain_error
from worldloom.ranks import RankError
from worldloom.starting import SIGNALS

POLL = 0.2  # seconds between two looks at the other processes
GRACE = 10.0  # seconds in which processes end by themselves after a failure, before they are killed
ANSWER = 3.0  # seconds that the store has to answer after a failure; its process may hang
# Parts of the messages of gloo and NCCL when another process has died or does not answer.
BROKEN = (
    *("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe"),
    *("gloo", "NCCL", "Connection refused", "Socket Timeout", "failed to recv", "failed to send"),
)


def is_broken_exchange(error: BaseException | None) -> bool:
    """Return whether an error, or one before it, is that another process has failed."""
    if error is None:
        return False
    text = f"{type(error).__module__}: {error}"
    known = isinstance(error, RankError | dist.DistError)
    known |= isinstance(error, RuntimeError) and any(part in text for part in BROKEN)
    return known or is_broken_exchange(error.__cause__ or error.__context__)


def describe_exit(code: int) -> str:
    """Return how a process ended, from its exit code; negative is a signal."""
    number = -code if code < 0 else code - 128
    if number in SIGNALS:
        return f"was stopped by {signal.Signals(number).name}"
    if code >= 0:
        return f"ended with exit code {code}"
    name = {s.value: s.name for s in signal.Signals}.get(number, f"signal {number}")
    return f"was killed by {name}" + " (out of memory?)" * (name == "SIGKILL")


def name_host() -> str:
    """Return a name of the machine that differs where a process id means another process."""
    space = "/proc/self/ns/pid"
    return f"{platform.node()} {os.readlink(space) if os.path.exists(space) else ''}"


class Peers:
    """The processes of a run, as one of them sees them; the first failure ends them all.

    store: in which the processes leave notes for each other, empty at the start.
    children: the processes that this one has started, by rank.
    terminal: file descriptor for errors.
    log: file to which errors are appended as well.
    hint: returns what to print after a failure: how to continue.
    failure: what happened first, as a sentence; None while all are well.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        children: dict[int, "subprocess.Popen[bytes]"],
        terminal: int = 2,
        log: Path | None = None,
        hint: Callable[[], str] = str,
    ) -> None:
        self.store, self.rank, self.size, self.children = store, rank, size, children
        self.terminal, self.log, self.hint = terminal, log, hint
        self.failure: str | None = None
        self.places: list[tuple[str, int]] = []  # host and process id of each rank
        self._handled: BaseException | None = None
        self._over = threading.Event()

    def meet(self, timeout: timedelta) -> None:
        """Wait until all processes are here; from then on, watch for failures.

        Raises:
            RankError: a process has ended, or did not come in time.
        """
        self.store.set(f"here {self.rank}", f"{name_host()}|{os.getpid()}")
        end, ranks = time.monotonic() + timeout.total_seconds(), range(self.size)
        while missing := [r for r in ranks if not self.store.check([f"here {r}"])]:
            self._look()
            if self.failure is None and time.monotonic() > end:
                seconds = timeout.total_seconds()
                self._record(f"rank {missing[0]} did not start within {seconds:g} seconds")
            if self.failure is not None:
                raise RankError(self.failure)
            time.sleep(POLL)
        notes = [self.store.get(f"here {r}").decode().rpartition("|") for r in ranks]
        self.places = [(host, int(pid)) for host, _, pid in notes]
        threading.Thread(target=self._watch, daemon=True).start()

    def part(self, seconds: float = math.inf) -> None:
        """Wait until all processes have come to the same end; only rank 0 waits for the others.

        It serves the store, so it must be the last.
        """
        end = time.monotonic() + seconds
        self.store.set(f"done {self.rank}", "")
        self._over.set()
        while self.rank == 0 and not self.failure and time.monotonic() < end:
            if all(self.store.check([f"done {r}"]) for r in range(self.size)):
                return
            self._look()
            time.sleep(POLL)

    def handle(self, error: BaseException) -> str:
        """Print an error of this process, or which other one has failed; return a sentence.

        A second call with the same error, or one that it caused, prints nothing.
        """
        if self._handled is not None:
            return self.failure or ""
        self._handled = error
        if self.rank > 0:  # this process ends anyway; rank 0, if it is killed now, sends SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if is_broken_exchange(error):
            self._find_failure(error)
        else:
            self._report_own(error)
        self._over.set()
        self._end_later(3 * GRACE if self.rank == 0 else GRACE)
        if self._is_first_alive():
            self._print((self.failure or "") if self.rank else "", self.hint())
        return f"stopped, because {self.failure}"

    def _report_own(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            self._record(f"rank {self.rank} was stopped by SIGINT")
            return
        if isinstance(error, USER_ERRORS):
            text = explain_error(error)
        # Where all ranks fail alike, as with an impossible setting, rank 0 prints it, at the end.
        note = f"error {text}"
        if self.rank == 0:
            _within(ANSWER, lambda: self.store.set(note, ""), None)
        if not (self.prints_last(error) or self._waits_for(note, error)):
            where = f" (the traceback is in worldloom-rank{self.rank}.log)" if self.rank else ""
            self._print(f"rank {self.rank}: {text}{where}")
        if not isinstance(error, USER_ERRORS):
            with suppress(OSError):
                os.write(self.terminal, "".join(traceback.format_exception(error)).encode())
        self._record(f"rank {self.rank} failed")

    def prints_last(self, error: BaseException) -> bool:
        """Return whether an error is printed, in one line, when the run has ended."""
        return self.rank == 0 and isinstance(error, USER_ERRORS) and not is_broken_exchange(error)

    def _waits_for(self, note: str, error: BaseException) -> bool:
        """Return whether rank 0 leaves a note that it has the same error, within a short time."""
        end = time.monotonic() + ANSWER
        while isinstance(error, USER_ERRORS) and time.monotonic() < end:
            if _within(ANSWER, lambda: self.store.check([note]), False):
                return True
            time.sleep(POLL)
        return False

    def _find_failure(self, error: BaseException) -> None:
        """Find out which rank has failed, and kill it if it hangs on this machine."""
        _within(ANSWER, lambda: self.store.set(f"alive {self.rank}", ""), None)
        end, others = time.monotonic() + GRACE / 2, [r for r in range(self.size) if r != self.rank]
        while self.failure is None and time.monotonic() < end:
            time.sleep(POLL)
            if dead := [r for r in others if self._is_dead(r)]:
                time.sleep(2 * POLL)  # its parent can say more, and it may have left a note
                self._record(f"rank {dead[0]} was killed")
        if self.failure is not None:
            return
        check = self.store.check
        silent = _within(ANSWER, lambda: [r for r in others if not check([f"alive {r}"])], [0])
        if not silent:
            self._record(" ".join(f"the exchange between the processes failed: {error}".split()))
            return
        listed = ", ".join(map(str, silent))
        self._record(f"rank {listed} did not answer in time (trainer.strategy.timeout)")
        for rank in silent:
            host, pid = self.places[rank] if self.places else ("", 0)
            if host == name_host():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _record(self, failure: str) -> None:
        """Note a failure for all, unless there was another one before."""
        if self.failure is None:
            note = lambda: self.store.compare_set("failure", "", failure).decode()  # noqa: E731
            self.failure = _within(ANSWER, note, failure)

    def _look(self) -> None:
        """Take note of children that have ended, and of failures of others."""
        for rank, child in self.children.items():
            if child.poll() is not None and not self.store.check([f"done {rank}"]):
                if self.store.check(["failure"]):
                    break
                self._record(f"rank {rank} {describe_exit(child.returncode)}")
        if self.failure is None and self.store.check(["failure"]):
            self.failure = self.store.get("failure").decode()

    def _watch(self) -> None:
        """End this process after a failure of another one, whatever it is waiting for."""
        while not self._over.wait(POLL):
            try:
                self._look()
            except RuntimeError:  # the store has ended with rank 0
                time.sleep(POLL)
                if not self._over.is_set():
                    self.failure = self.failure or "rank 0 was killed"
            if self.failure is not None:
                self._end_later(4 * GRACE if self.rank == 0 else 2 * GRACE)
                return

    def _end_later(self, seconds: float) -> None:
        """End this process after a number of seconds, even if one of its threads hangs."""
        timer = threading.Timer(seconds, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if self._handled is None and self._is_first_alive():
            self._print(f"stopped, because {self.failure}", self.hint())
        for child in self.children.values():
            child.kill()
        os._exit(1)

    def _is_first_alive(self) -> bool:
        """Return whether this is the first process that can still print."""
        lost, _, how = (self.failure or "").removeprefix("rank ").partition(" ")
        lost = "" if how == "failed" else lost.strip(",")  # then it prints by itself
        return all(str(r) == lost or self._is_dead(r) for r in range(self.rank))

    def _is_dead(self, rank: int) -> bool:
        """Return whether a process of this machine has ended."""
        if rank in self.children:
            return self.children[rank].poll() is not None
        host, pid = self.places[rank] if self.places else ("", 0)
        return host == name_host() and not _exists(pid)

    def _print(self, *lines: str) -> None:
        sys.stdout.flush()
        text = "".join(f"{line}\n" for line in lines if line).encode(errors="replace")
        with suppress(OSError):
            os.write(self.terminal, text)
        if self.log is not None:
            with suppress(OSError), self.log.open("ab") as file:
                file.write(text)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def _within(seconds: float, call: Callable[[], Any], otherwise: Any) -> Any:
    """Return the result of a call, or `otherwise` if it fails or takes too long."""
    found = [otherwise]

    def run() -> None:
        with suppress(RuntimeError):
            found[0] = call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0]
