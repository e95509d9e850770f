"""Run a function in several processes of one process group (gloo), as ranks that train together."""

import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

# Processes are forks of a server that has imported these, so that each starts within milliseconds.
PRELOADED = [
    "lightning",
    "worldloom",
    *("worldloom.app.build", "worldloom.factory", "worldloom.training.module"),
]
# A server of its own: that of multiprocessing may run already, without these imports.
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(PRELOADED)
CONNECT = SERVER.connect_to_new_process
SECONDS = 120  # that all ranks together may take, on a machine with other jobs


def run_ranks(
    function: Callable[..., Any], size: int, *args: Any, seconds: float = SECONDS
) -> list[Any]:
    """Return function(rank, *args) of `size` processes, in the order of the ranks.

    function: defined at the top of a module, because the processes import it. Like arguments and
        results it is pickled.
    size: number of processes, each with one thread; a single one gets no process group.
    seconds: after which all processes are killed.

    The environment has what torchrun sets, except an address and a port: processes find each other
    through a file, and Lightning uses the group that it finds.

    Raises:
        TimeoutError: the processes took too long.
        Exception: that of the first process that failed, caused by a RuntimeError with its
            traceback; the other processes are killed.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        call = pickle.dumps((function, args))
        # By path: in a new process, "tests" may be a package that another project has installed.
        processes = [
            context.Process(
                target=runpy.run_path,
                args=(__file__, {"job": (sender, folder, rank, size, call)}, "rank"),
                daemon=True,
            )
            for rank, (_, sender) in enumerate(pipes)
        ]
        try:
            for process, (_, sender) in zip(processes, pipes, strict=True):
                with mock.patch.object(forkserver, "connect_to_new_process", CONNECT):
                    process.start()
                sender.close()  # so that the end of the process closes the pipe
            return _receive([receiver for receiver, _ in pipes], time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
                process.close()


def _receive(receivers: list[Connection], end: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [pipe for rank, pipe in enumerate(receivers) if rank not in results]
        ready = wait(waiting, max(0, end - time.monotonic()))
        missing = [rank for rank in range(len(receivers)) if rank not in results]
        if not ready:
            raise TimeoutError(f"ranks {missing} did not return in time")
        for pipe in ready:
            rank = receivers.index(pipe)
            try:
                result, error, trace = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if error is not None:
                raise error from RuntimeError(f"rank {rank}:\n{trace}")
            results[rank] = result
    return [results[rank] for rank in range(len(receivers))]


def _run_rank(sender: Connection, folder: str, rank: int, size: int, call: bytes) -> None:
    """Join the group, call the function and send what it returns or raises."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({k: str(v) for k, v in {**numbers, "GROUP_RANK": 0}.items()})
    os.environ.pop("PL_GLOBAL_SEED", None)  # of another test: Lightning would use it
    sys.modules["tests"] = types.ModuleType("tests")
    sys.modules["tests"].__path__ = [str(Path(__file__).parent)]
    try:
        if size > 1:
            store = Path(folder, "store").as_uri()
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        function, args = pickle.loads(call)
        result = pickle.dumps((function(rank, *args), None, ""))
        if size > 1:
            dist.barrier()  # the last exchange needs all processes
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            result = pickle.dumps((None, error, trace))
            pickle.loads(result)
        except Exception:
            result = pickle.dumps((None, RuntimeError(repr(error)), trace))
    sender.send_bytes(result)


if __name__ == "rank":
    _run_rank(*job)  # type: ignore[name-defined]  # noqa: F821, given by `run_ranks`
