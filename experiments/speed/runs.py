"""Measure environment steps per second and peak memory of whole training runs, turn by turn.

usage: python experiments/speed/runs.py [--obs state pixels] [--ratio 512 64] [--turns 3]
       [--seconds 60] [--envs 4] [--threads 2] [--peers FOLDER] [--only NAME…] [--json FILE]

DeepMind Control walker-walk, DreamerV3 size1m, two simulator steps per action. Each run is a
process with its own command line; it counts from its tenth update on and is ended after --seconds.
--json adds the results to those in the file, replaces those of the same runs and prints one table
of all of them. See README.md for how to install the others and for what differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from struct import unpack

HERE = Path(__file__).resolve().parent
BATCH = 16 * 64  # rows of an update
REPEAT = 2  # simulator steps per action
PREFILL = 66  # actions in each environment before the first update, which r2dreamer has fixed
WARM_UPDATES = 10
PATIENCE = 900  # seconds for starting and warming up
NAMES = ("worldloom", "worldloom-bf16", "sheeprl", "r2dreamer")


@dataclass(frozen=True)
class Run:
    """What one run measured; rates are per second.

    steps: simulator steps; there are two per action.
    peak: bytes of memory, peaks of all its processes added up.
    """

    name: str
    obs: str
    ratio: int
    envs: int
    turn: int
    steps: float
    updates: float
    peak: int
    seconds: float
    date: str

    @property
    def replayed(self):
        """Return replayed rows per action, which is the train ratio that was kept."""
        return self.updates * BATCH / (self.steps / REPEAT)


def command(name, obs, ratio, envs, threads, folder, peers):
    """Return the command line of a training run that writes to `folder`."""
    pixels = obs == "pixels"
    if name.startswith("worldloom"):
        precision = "bf16-mixed" if name.endswith("bf16") else "32-true"
        return [
            sys.executable, "-m", "worldloom.run", "model=dreamerv3_size1m",
            f"experiment=dreamerv3/dmc_{'vision' if pixels else 'proprio'}",
            f"env.num_envs={envs}", f"env.action_repeat={REPEAT}", "data.capacity=100000",
            f"training.train_ratio={ratio}", f"trainer.precision={precision}",
            "training.prefill_counts=steps", f"training.prefill={PREFILL * envs}",
            f"threads={threads}", f"folder={folder}/run",
        ]  # fmt: skip
    venv = f"{peers}/venv-torch/bin"
    if name == "sheeprl":
        cnn, mlp = ("[rgb]", "[]") if pixels else ("[]", "[state]")
        return [
            f"{venv}/sheeprl", "exp=dreamer_v3_5_dmc_walker_walk", "algo=dreamer_v3_5_1M",
            f"env.num_envs={envs}", f"env.action_repeat={REPEAT}", "env.capture_video=False",
            f"env.wrapper.from_pixels={pixels}", f"env.wrapper.from_vectors={not pixels}",
            f"algo.cnn_keys.encoder={cnn}", f"algo.mlp_keys.encoder={mlp}",
            f"algo.replay_ratio={ratio / BATCH}", f"algo.learning_starts={PREFILL * envs}",
            "buffer.size=100000", f"num_threads={threads}", f"log_root={folder}",
        ]  # fmt: skip
    return [
        f"{venv}/python", f"{peers}/r2dreamer/train.py",
        f"env=dmc_{'vision' if pixels else 'proprio'}", "device=cpu", "model.compile=false",
        "model.rep_loss=dreamer", "model.units=64", "model.hidden=64", "model.deter=512",
        "model.discrete=4", "model.depth=4", f"env.env_num={envs}", "env.eval_episode_num=0",
        f"env.action_repeat={REPEAT}", f"env.train_ratio={ratio}", "buffer.max_size=1e5",
        f"logdir={folder}/run",
    ]  # fmt: skip


class Counts:
    """Steps and updates of a program that runs with counted/ in its PYTHONPATH."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir()

    def read(self):
        """Return steps and updates so far, of all processes together."""
        found = [path.read_bytes() for path in self.folder.iterdir()]
        counts = [unpack("qq", content) for content in found if len(content) == 16]
        return tuple(map(sum, zip(*counts, strict=True))) if counts else (0, 0)


def measure(args, environment, folder, seconds, warm=WARM_UPDATES):
    """Run a command; return steps and updates per second, seconds counted, and peak memory.

    Both ends of the time that is counted are the end of the first update after new steps, so that
    neither an update nor the steps between two series of updates are counted in part.
    """
    counts, log = Counts(f"{folder}/counts"), Path(folder) / "log"
    paths = [str(HERE / "counted"), environment.get("PYTHONPATH", "")]
    own = {"COUNTS": str(counts.folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with log.open("w") as out:
        process = subprocess.Popen(args, stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            cwd=folder, env=environment | own, start_new_session=True)  # fmt: skip
    begun, first, peak, looked = time.perf_counter(), None, 0, 0.0
    last = 0, 0  # steps and updates after the latest update
    try:
        while True:
            now, (steps, done) = time.perf_counter(), counts.read()
            if done > last[1]:
                if steps > last[0] and done > warm:
                    first = first or (now, steps, done)
                    span = now - first[0]
                    if span >= seconds:
                        peak = max(peak, peak_memory(process.pid))
                        return (steps - first[1]) / span, (done - first[2]) / span, span, peak
                last = steps, done
            if process.poll() is not None or (first is None and now - begun > PATIENCE):
                tail = "".join(log.read_text().splitlines(keepends=True)[-15:])
                raise RuntimeError(f"{args} ended or took too long; its last words:\n{tail}")
            if now - looked > 1:
                peak, looked = max(peak, peak_memory(process.pid)), now
            time.sleep(0.005)
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def peak_memory(session):
    """Return the sum of the peak memory, in bytes, of the living processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            lines = (
                (folder / "status").read_text().splitlines() if fields[3] == str(session) else ()
            )
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return total


def table(runs):
    """Return one line per implementation, observation and ratio; worldloom / it is by turn."""
    lines = [
        "| observations | ratio | implementation | steps/s | min | max | it / worldloom | "
        "updates/s | ratio kept | peak MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for obs, ratio, name in dict.fromkeys((run.obs, run.ratio, run.name) for run in runs):
        same = [run for run in runs if (run.obs, run.ratio) == (obs, ratio)]
        ours = {run.turn: run.steps for run in same if run.name == "worldloom"}
        its = [run for run in same if run.name == name]
        steps = [run.steps for run in its]
        relative = [run.steps / ours[run.turn] for run in its if run.turn in ours]
        shown = [f"{f(steps):.1f}" for f in (median, min, max)]
        shown.append(f"{median(relative):.2f}" if relative else "")
        shown.append(f"{median(run.updates for run in its):.2f}")
        shown.append(f"{median(run.replayed for run in its):.0f}")
        shown.append(f"{median(run.peak for run in its) / 1e6:,.0f}")
        lines.append(f"| {obs} | {ratio} | {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def merge(old, new):
    """Return the runs of both, without old ones of an implementation that ran again."""
    again = {(run.name, run.obs, run.ratio) for run in new}
    return [run for run in old if (run.name, run.obs, run.ratio) not in again] + list(new)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--obs", nargs="*", choices=("state", "pixels"), default=["state", "pixels"]
    )
    parser.add_argument("--ratio", nargs="*", type=int, default=[512, 64])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--envs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=os.environ.get("WORLDLOOM_PEERS", "/work/peers"))
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path, help="file of results to add to")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and end the run, too
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(given.threads))
    runs = []
    for obs, ratio, turn in product(given.obs, given.ratio, range(given.turns)):
        for name in given.only:
            environment = os.environ | threads | {"NO_IMAGES": str(int(obs == "state"))}
            environment.setdefault("MUJOCO_GL", "egl")
            if name.startswith("worldloom"):
                environment["PYTHONPATH"] = str(HERE.parents[1])
            else:
                environment.pop("PYTHONPATH", None)
            with tempfile.TemporaryDirectory() as folder:
                args = command(name, obs, ratio, given.envs, given.threads, folder, given.peers)
                steps, updates, span, peak = measure(args, environment, folder, given.seconds)
            today = f"{datetime.now(UTC):%Y-%m-%d}"
            runs.append(Run(name, obs, ratio, given.envs, turn, steps, updates, peak, span, today))
            print(runs[-1], file=sys.stderr)
            old = []
            if given.json and given.json.exists():
                old = [Run(**each) for each in json.loads(given.json.read_text())]
            merged = merge(old, runs)
            if given.json:
                given.json.write_text(json.dumps([asdict(run) for run in merged], indent=1) + "\n")
    print(table(merged))


if __name__ == "__main__":
    main()
