"""The processes that train one run together: how they start, find each other and end.

Rank 0 reads the command line and sends the resolved configuration to the others through a
TCPStore, so these need no arguments, use the same folder, name and seed, and a sweep runs once.
They are started by torchrun or srun, or else by this module: rank 0 starts those of its machine.
Where a user starts one command on each of several machines, the first process starts the others.
"""

import atexit
import itertools
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from worldloom.app.failures import GRACE, POLL, Peers
from worldloom.app.run_dir import LOG
from worldloom.app.saved_config import ResolvedConfig, format_command
from worldloom.app.shares import require_divisible
from worldloom.memory import require_memory
from worldloom.ranks import Ranks

PROCESS_BYTES = 2**27  # lower limit of the memory of a process that has imported torch
CONNECT = timedelta(seconds=300)  # that rank 0 has to start


class Job(NamedTuple):
    """A run, as rank 0 sends it to the other processes.

    local: processes on each of `nodes` machines.
    """

    config: ResolvedConfig
    resumes: bool
    nodes: int
    local: int
    backend: str
    timeout: timedelta


class Processes:
    """This process's place among those of its runs.

    rank: of this process; node: of its machine.
    """

    def __init__(self) -> None:
        env = dict(os.environ)
        if int(env.get("SLURM_NTASKS", 1)) > 1 and "RANK" not in env:
            env |= _read_slurm()
        # Whether torchrun, srun, or a process of worldloom has started this one.
        self.outside = "RANK" in env and int(env.get("WORLD_SIZE", 1)) > 1
        self.node = 0 if self.outside else int(env.get("NODE_RANK", 0))
        self.rank = int(env["RANK"]) if self.outside else -1 if self.node else 0
        self.env = env
        self.peers: Peers | None = None
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self._store: Any = None
        self._served = ("", 0)  # address and port of the store
        self._broken = ""  # why the others have ended
        self._jobs = itertools.count()

    def work(self, train: Callable[[ResolvedConfig, bool], object]) -> None:
        """Train what rank 0 sends, in a process that is not rank 0, until rank 0 ends."""
        store = self._store = self._connect()
        number = next(self._jobs)
        try:
            while not store.check(["end"]):
                if not store.check([f"job {number}"]):
                    time.sleep(POLL)
                    continue
                job = pickle.loads(store.get(f"job {number}"))
                if self.rank < 0:
                    self.rank = self.node * job.local
                if not self.outside and not self.children:
                    self._start_children(job, self.env["MASTER_ADDR"], self.env["MASTER_PORT"])
                with _log_output(Path(job.config.plain["folder"]), self.rank) as terminal:
                    self._train(job, number, train, terminal)
                number = next(self._jobs)
            code = int(store.get("end"))
            store.set(f"bye {self.rank}", "")
        except RuntimeError:  # rank 0 has ended, and has printed why
            code = 1
        finally:
            self._end_children(GRACE)
        sys.exit(code)

    def _train(self, job: Job, number: int, train: Callable[..., object], terminal: int) -> None:
        try:
            with self._joined(job, number, terminal):
                train(job.config, job.resumes)
        except (Exception, KeyboardInterrupt):
            logging.getLogger(__name__).exception("this process ends")
            sys.stdout.flush()
            self._end_children(0.0)
            os._exit(1)

    @contextmanager
    def training(self, config: ResolvedConfig, resumes: bool) -> Iterator[None]:
        """Train with all processes that the configuration asks for, inside the block, as rank 0.

        Raises:
            ValueError: torchrun or srun has started another number of processes, or the first
                process of several machines does not have an address.
            ChildProcessError: a process has failed; it has printed why.
        """
        job = _plan(config, resumes, self.outside)
        if job is None:
            yield
            return
        if self._broken:  # in a sweep of which torchrun or srun has started the processes, once
            sys.exit(f"error: {self._broken}")
        self._require_size(job)
        require_divisible(config.plain, job.nodes * job.local)
        address, port = self.env.get("MASTER_ADDR", "127.0.0.1"), self.env.get("MASTER_PORT", "")
        alone = not self.outside and job.nodes == 1
        if alone:
            address, self._jobs = "127.0.0.1", itertools.count()
            self._store, port = self._make_store(address, 0, True)
        elif self._store is None:
            self._store = self._connect()
            atexit.register(self._finish, 0, job.nodes * job.local)
        number = next(self._jobs)
        try:
            if not self.outside and not self.children:
                self._start_children(job, address, port)
            self._store.set(f"job {number}", pickle.dumps(job))
            with self._joined(job, number, 2):
                yield
        except (Exception, KeyboardInterrupt) as error:
            self._broken = "" if alone else str(error)
            self._end_children(POLL if isinstance(error, KeyboardInterrupt) else GRACE)
            raise
        finally:
            if alone:
                self._finish(0, job.local)

    def _finish(self, code: int, size: int) -> None:
        """Let the other processes end; this one serves the store, so it ends last."""
        if self._store is not None:
            with suppress(RuntimeError):
                self._store.set("end", str(code))
                end = time.monotonic() + GRACE * (code == 0 and not self.children)
                while time.monotonic() < end:
                    if all(self._store.check([f"bye {r}"]) for r in range(1, size)):
                        break
                    time.sleep(POLL)
            self._end_children(3 * GRACE)
            self._store = None

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Let the other processes wait for this one inside the block, as rank 0."""
        self._store = self._connect()
        code = 1
        try:
            yield
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            raise
        finally:
            self._finish(code, int(self.env["WORLD_SIZE"]))

    @contextmanager
    def _joined(self, job: Job, number: int, terminal: int) -> Iterator[None]:
        """Join the process group, inside the block."""
        import torch.distributed as dist

        size, plain = job.nodes * job.local, job.config.plain

        def hint() -> str:
            from worldloom.training.checkpoint_files import has_checkpoint

            if not has_checkpoint(Path(plain["folder"]) / "checkpoints"):
                return ""
            again = format_command("run", f"resume={plain['folder']}", config=plain)
            return f"to continue from the last checkpoint:\n{again}"

        # A connection of its own: while one waits, other threads cannot use it.
        notes = self._make_store(*self._served, False)[0]
        store = dist.PrefixStore(f"run {number}", notes)
        log = Path(plain["folder"]) / LOG
        peers = Peers(store, self.rank, size, self.children, terminal, log, hint)
        self.peers = peers
        before = dict(os.environ)
        os.environ.update(self._places(job, self.rank))
        Ranks.timeout = job.timeout
        try:
            peers.meet(job.timeout)
            group = dist.PrefixStore(f"group {number}", self._store)
            dist.init_process_group(
                job.backend, store=group, rank=self.rank, world_size=size, timeout=job.timeout
            )
            try:
                yield
            except SystemExit:  # stopped by a signal
                peers.part(3 * GRACE)
                raise
            peers.part()
        except (Exception, KeyboardInterrupt) as error:
            sentence = peers.handle(error)
            if isinstance(error, KeyboardInterrupt) or peers.prints_last(error):
                raise
            raise ChildProcessError(sentence) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            os.environ.clear()
            os.environ.update(before)
            self.peers = None

    def _places(self, job: Job, rank: int) -> dict[str, str]:
        """Return the variables that torchrun would set for a process."""
        numbers = {
            "RANK": rank,
            "LOCAL_RANK": rank % job.local,
            "WORLD_SIZE": job.nodes * job.local,
            "LOCAL_WORLD_SIZE": job.local,
            "GROUP_RANK": rank // job.local,
            "NODE_RANK": rank // job.local,
        }
        return {name: str(number) for name, number in numbers.items()}

    def _start_children(self, job: Job, address: str, port: str) -> None:
        """Start the other processes of this machine."""
        from hydra.core.hydra_config import HydraConfig

        cwd = HydraConfig.get().runtime.cwd if HydraConfig.initialized() else None
        first = self.rank
        for rank in range(first + 1, first + job.local):
            env = {**os.environ, **self._places(job, rank)}
            env |= {"MASTER_ADDR": address, "MASTER_PORT": port}
            env["WORLDLOOM_PARENT"] = str(os.getpid())
            for name in ("TORCHELASTIC_USE_AGENT_STORE", "HYDRA_FULL_ERROR"):
                env.pop(name, None)
            self.children[rank] = subprocess.Popen(
                [sys.executable, "-m", "worldloom.run"], env=env, cwd=cwd, stdin=subprocess.DEVNULL
            )

    def _end_children(self, patience: float) -> None:
        """Wait for the children to end; kill those that do not."""
        end = time.monotonic() + patience
        for child in self.children.values():
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()))
        for child in self.children.values():
            child.kill()
            child.wait()
        self.children.clear()

    def _require_size(self, job: Job) -> None:
        size, given = job.nodes * job.local, int(self.env.get("WORLD_SIZE", 1))
        if self.outside and size != given:
            raise ValueError(
                f"WORLD_SIZE or SLURM_NTASKS, of torchrun or srun, is {given}, but trainer.devices "
                f"and trainer.num_nodes ask for {job.local} x {job.nodes}; set trainer.devices to "
                "the processes of one machine and trainer.num_nodes to the number of machines"
            )
        if not self.outside and job.nodes > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= {*self.env}:
            raise ValueError(
                f"trainer.num_nodes is {job.nodes}, but MASTER_ADDR and MASTER_PORT are not set; "
                "start the command on each machine with MASTER_ADDR (of the first machine), "
                "MASTER_PORT (a free port there) and NODE_RANK=0, 1, …, or use torchrun or srun"
            )

    def _connect(self) -> Any:
        """Connect to the store of rank 0, or serve it there."""
        address, port = self.env["MASTER_ADDR"], int(self.env["MASTER_PORT"])
        # torchrun may serve it instead.
        serves = self.rank == 0 and self.env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        end = time.monotonic() + CONNECT.total_seconds()
        while not serves:  # not in torch, which Ctrl-C would not interrupt
            try:
                socket.create_connection((address, port), 5).close()
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise ValueError(
                        f"rank 0 cannot be reached at {address}:{port} (MASTER_ADDR, MASTER_PORT): "
                        f"{error}; start it, and check the address and the firewall"
                    ) from None
            time.sleep(POLL)
        return self._make_store(address, port, serves)[0]

    def _make_store(self, address: str, port: int, serves: bool) -> tuple[Any, str]:
        """Return a store and its port, which is a free one for port 0."""
        import torch.distributed as dist

        store = dist.TCPStore(address, port, None, serves, CONNECT, wait_for_workers=False)
        attempt = self.env.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._served = address, store.port
        return dist.PrefixStore(f"worldloom {attempt}", store), str(store.port)


def _read_slurm() -> dict[str, str]:
    """Return the variables that torchrun would set, from those of srun."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect():
        return {}
    slurm, tasks = SLURMEnvironment(), int(os.environ["SLURM_NTASKS"])
    return {
        "RANK": str(slurm.global_rank()),
        "WORLD_SIZE": str(tasks),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def _plan(config: ResolvedConfig, resumes: bool, outside: bool) -> Job | None:
    """Return how a run is shared among processes; None for a run in one process.

    outside: whether several were started already.
    """
    import hydra.utils

    trainer = config.plain["trainer"]
    nodes, devices = trainer.get("num_nodes", 1), trainer.get("devices", "auto")
    if nodes == 1 and str(devices) == "1" and not outside:
        return None
    if isinstance(devices, int):
        require_memory(PROCESS_BYTES * (devices * nodes - 1), f"trainer.devices={devices}")
    probe = probe_trainer(trainer)
    local = probe.num_devices
    if nodes * local == 1 and not outside:
        return None
    strategy = trainer.get("strategy")
    wait = strategy.get("timeout") if isinstance(strategy, dict) else None
    if not isinstance(wait, dict | None):
        raise ValueError(
            f"trainer.strategy.timeout is {wait!r}; set trainer.strategy.timeout.seconds instead"
        )
    on_gpu = probe.strategy.root_device.type == "cuda"
    return Job(
        *(config, resumes, nodes, local, "cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        Ranks.timeout if wait is None else hydra.utils.instantiate(wait),
    )


def probe_trainer(section: Mapping[str, Any]) -> Any:
    """Return a trainer with the accelerator and devices of a trainer section, to read them.

    Raises:
        ValueError: Lightning does not accept the devices.
    """
    import lightning
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    chosen = {name: section[name] for name in ("accelerator", "devices") if name in section}
    try:
        return lightning.Trainer(
            **chosen, logger=False, enable_checkpointing=False, plugins=[LightningEnvironment()]
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ValueError(f"trainer.devices is {section.get('devices')!r}: {error}") from None


@contextmanager
def _log_output(folder: Path, rank: int) -> Iterator[int]:
    """Send what this process prints to worldloom-rank1.log; yields the terminal's descriptor."""
    sys.stdout.flush()
    saved = [os.dup(1), os.dup(2)]
    number = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):
        number = os.open(
            folder / f"worldloom-rank{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
        )
    for stream in (1, 2):
        os.dup2(number, stream)
    os.close(number)
    style = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
    logging.basicConfig(level=logging.INFO, format=style, stream=sys.stdout)
    try:
        yield saved[1]
    finally:
        sys.stdout.flush()
        for stream, before in zip((1, 2), saved, strict=True):
            os.dup2(before, stream)
            os.close(before)


processes = Processes()
