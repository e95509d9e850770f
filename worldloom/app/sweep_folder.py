"""The folder of a sweep: its overrides, and the state of each of its jobs.

sweep.yaml is written by the one process that drives the sweep; logs/ has what each job printed;
every other folder is a run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from worldloom.app.cluster_queue import ENDED, LIVE, RUNNING, find_states
from worldloom.app.run_dir import CONFIG, LOCK, SCORES, hold_lock, is_claimed
from worldloom.errors import quote
from worldloom.files import check_format, read_yaml, write_yaml
from worldloom.starting import SIGNALS

log = logging.getLogger(__name__)

RECORD, LOGS = "sweep.yaml", "logs"
WAITING, FINISHED, FAILED, INTERRUPTED = "waiting", "finished", "failed", "interrupted"
# Exit codes of a run that was stopped or killed by one of the signals that stop runs.
STOPPED = (0, *(code for number in SIGNALS for code in (-number, 128 + number)))
FORMAT = 1  # version of sweep.yaml
BUSY = "another process runs the sweep {}; wait for it, stop it, or use another sweep=NAME"
ADVICE = "use another sweep=NAME, or delete the folder"


class SweepFolder:
    """The folder of a sweep, held by the process that drives it; see `hold_sweep`.

    varied: keys in which the runs differ.
    fixed: {key: value} of the overrides that all runs share.
    search: what sweep.yaml has about a search, whose folder several processes may use.
    """

    def __init__(
        self,
        path: Path,
        varied: Sequence[str],
        fixed: Mapping[str, str],
        search: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.varied, self.fixed = path, list(varied), dict(fixed)
        self.search = dict(search or {})
        self.jobs: dict[str, dict[str, Any]] = {}
        self._written: tuple[int, int] | None = None

    def update(self, name: str, **values: Any) -> None:
        """Record what is new about a job, and write sweep.yaml."""
        with self.changing():
            self.jobs.setdefault(name, {}).update(values)
            self.write()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the folder of a search inside the block, and read what others have recorded.

        Other sweeps have no others. The block cannot contain another one.
        """
        if not self.search:
            yield
            return
        busy = f"another process has held {self.path / LOCK} for ten minutes; stop it"
        with hold_lock(self.path, busy, "run this search once at a time", seconds=600):
            if _stamp(self.path) != self._written:
                self.jobs = read_record(self.path)["jobs"]
            yield

    def write(self) -> None:
        """Write sweep.yaml; if the disk is full, warn and continue."""
        record: dict[str, Any] = {"fixed": self.fixed, "varied": self.varied}
        record |= {"search": self.search} if self.search else {}
        record["jobs"] = self.jobs
        try:
            write_yaml(self.path / RECORD, record, FORMAT)
            self._written = _stamp(self.path)
        except OSError as error:
            log.warning("%s cannot be written now (%s)", self.path / RECORD, error)


def require_idle(path: Path) -> None:
    """Raise ValueError if another process drives a sweep."""
    if is_claimed(path):
        raise ValueError(BUSY.format(path))


@contextmanager
def hold_sweep(
    path: Path, varied: Sequence[str], fixed: Mapping[str, str]
) -> Iterator[SweepFolder]:
    """Hold the lock of a sweep's folder, which only one process may drive.

    A key that the sweep varied before may now have one value.

    Raises:
        ValueError: another process drives it, or its runs have other overrides.
    """
    with hold_lock(path, BUSY.format(path), "run this sweep once at a time"):
        try:
            sweep = SweepFolder(path, varied, fixed)
            if (path / RECORD).exists():
                before = read_record(path)
                sweep.jobs = before["jobs"]
                _require_same(path, before, sweep)
            yield sweep
        finally:
            if not (path / RECORD).exists():  # nothing was started
                (path / LOCK).unlink(missing_ok=True)


def open_search(
    path: Path, varied: Sequence[str], fixed: Mapping[str, str], search: Mapping[str, Any]
) -> SweepFolder:
    """Return the folder of a search, after comparing it with what is recorded there.

    Raises:
        ValueError: its trials have another space, other settings or other overrides.
    """
    sweep = SweepFolder(path, varied, fixed, search)
    if (path / RECORD).exists():  # a sweep that is not a search holds the lock all the time
        _require_same(path, read_record(path), sweep)
    with hold_lock(path, f"another process holds {path / LOCK}; stop it", "", seconds=60):
        if (path / RECORD).exists():
            _require_same(path, read_record(path), sweep)
        else:
            sweep.write()
    return sweep


def describe_best(search: Mapping[str, Any]) -> list[str]:
    """Return lines about the best trial of a search, with a command that trains it again.

    search: what sweep.yaml has about the search.
    """
    if not (best := search.get("best")):
        return []
    again = [*search["command"], *best["overrides"], f"seed={','.join(search['seeds'])}"]
    return [
        f"best: trial{best['trial']}, {search['metric']} {best['score']:,.6g}: "
        + " ".join(best["overrides"]),
        "to train it again with other seeds:",
        f"python -m worldloom.run -m {quote(*again)}",
    ]


def read_best(path: Path) -> list[str]:
    """Return the lines of `describe_best` for a folder; empty if it is not that of a search."""
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # also if damaged
        if (path / RECORD).is_file():
            best = describe_best(read_record(path).get("search") or {})
            return best if all(map(str.isprintable, best)) else []
    return []


def name_lock(trial: int) -> str:
    """Return the name of the file in logs/ that the process locks which runs a trial."""
    return f"trial{trial}.lock"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when another process writes sweep.yaml."""
    try:
        found = (path / RECORD).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _require_same(path: Path, before: Mapping[str, Any], sweep: SweepFolder) -> None:
    """Treat single values of a key that the sweep varies as varied; compare the other overrides."""
    for key in set(before["varied"]) & sweep.fixed.keys():
        del sweep.fixed[key]
        sweep.varied.append(key)
    fixed, held = sweep.fixed, before["fixed"]
    for key in sorted({*fixed, *held} - {*before["varied"], *sweep.varied}):
        if fixed.get(key) != held.get(key):
            pair = held.get(key, "not given"), fixed.get(key, "not given")
            raise ValueError(
                f"the runs of {path} have another {key} (there: {pair[0]}; now: {pair[1]}); "
                f"use the same override, or another sweep=NAME"
            )
    if other := set(before["varied"]) ^ set(sweep.varied):
        raise ValueError(
            f"the runs of {path} differ in {', '.join(before['varied']) or 'nothing'}, but now in "
            f"{', '.join(sweep.varied) or 'nothing'}; give values for {', '.join(sorted(other))} "
            "as before, or use another sweep=NAME"
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return sweep.yaml.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    record = read_yaml(path / RECORD, ADVICE, interpolations=True)
    is_record = isinstance(record, dict)
    check_format(path / RECORD, record.get("format") if is_record else None, FORMAT, ADVICE)
    kinds: dict[str, type] = {"jobs": dict, "fixed": dict, "varied": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    jobs = {} if "jobs" in wrong else {str(name): job for name, job in record["jobs"].items()}
    wrong += [n for n, job in jobs.items() if Path(n).name != n or not isinstance(job, dict)]
    if wrong:
        raise ValueError(f"{path / RECORD} has no valid {wrong[0]!r}; {ADVICE}")
    return record


def read_jobs(path: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs of a sweep by name, with their present states.

    Each has `differs` ({key: value}), `state` (waiting, queued, running, finished, failed or
    interrupted), and if it was started `started` and `ended` (ISO 8601, UTC), `code` (exit code)
    and `error`. Jobs that were submitted to a cluster have `cluster`, with their `id`; SLURM is
    asked for those that have not ended.

    Raises:
        ValueError: sweep.yaml is damaged, or of another version.
    """
    jobs, held = read_record(path)["jobs"], is_claimed(path)
    begun = {n: job for n, job in jobs.items() if job.get("state") in (WAITING, *LIVE)}
    found = find_states(path, {n: j["cluster"] for n, j in begun.items() if j.get("cluster")})
    for name, job in jobs.items():
        recorded, (there, code) = str(job.get("state", WAITING)), found.get(name, (ENDED, None))
        if there in LIVE:
            recorded = there
        elif there == ENDED and recorded in LIVE and code not in (None, *STOPPED):
            recorded = FAILED
        trial = job.get("trial")  # of a search, whose folder is held for moments only
        is_trial = isinstance(trial, int)
        driven = is_claimed(path / LOGS, name_lock(trial)) if is_trial else held
        job["state"] = decide_state(path / name, recorded, driven or there != ENDED)
    return jobs


def decide_state(run: Path, recorded: str = INTERRUPTED, driven: bool = False) -> str:
    """Return the present state of a run: what its files show precedes what was recorded.

    recorded: in sweep.yaml. driven: whether a living process drives the sweep, or a cluster has
        the job.
    """
    if (run / SCORES).is_file():
        return FINISHED
    if is_claimed(run):
        return RUNNING
    if recorded == FINISHED or (recorded in LIVE and not driven):
        return INTERRUPTED
    if recorded == WAITING and not driven and (run / CONFIG).is_file():
        return INTERRUPTED  # before the sweep started again, and was stopped
    return recorded


def read_differs(run: Path) -> dict[str, Any]:
    """Return {key: value} of what a run differs in from others of its sweep; {} without a sweep."""
    with suppress(ValueError):  # a damaged file must not stop the run
        if (run.parent / RECORD).is_file():
            return dict(read_record(run.parent)["jobs"].get(run.name, {}).get("differs", {}))
    return {}
