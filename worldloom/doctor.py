"""The command `worldloom doctor`: what this machine and this installation can do.

usage: worldloom doctor

Prints versions, devices, threads, renderers, the suites, dataset formats, loggers and figures that
can be used, how to install the others, and the free disk space of the current folder.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import worldloom
from worldloom.app.command_line import join_lines, run_command
from worldloom.app.compose import Overrides
from worldloom.envs.renderer import RENDERERS, probe

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "gymnasium", "numpy")
# {what: (the module that it needs, the extra of worldloom that installs it)}
PARTS = {
    "suites": {
        "gymnasium": ("gymnasium", ""),
        "pixels of gymnasium": ("pygame", "pixels"),
        "Box2D": ("Box2D", "box2d"),
        "MuJoCo": ("mujoco", "mujoco"),
        "atari": ("ale_py", "atari"),
        "crafter": ("crafter", "crafter"),
        "minigrid": ("minigrid", "minigrid"),
        "dmc": ("dm_control.suite", "dmc"),
        "metaworld": ("metaworld", "metaworld"),
        "robotics": ("gymnasium_robotics", "robotics"),
        "memory_maze": ("memory_maze", "memory-maze"),
    },
    "datasets": {"HDF5": ("h5py", "offline"), "Minari": ("minari", "offline")},
    "videos": {".gif": ("PIL", ""), ".mp4": ("av", "video")},
    "figures": {"worldloom plot": ("matplotlib", "plot")},
    "export": {".pt2": ("torch", ""), ".onnx": ("onnxscript", "export")},
    "loggers": {
        "TensorBoard": ("tensorboard", ""),
        "W&B": ("wandb", "wandb"),
        "MLflow": ("mlflow", "mlflow"),
    },
}
# Its tasks are imported without the package itself, which needs the old gym.
NOT_IMPORTED = ("memory_maze",)
# A package that cannot be imported, or that ends the process, does not affect the others.
IMPORTS = """
import contextlib, importlib, os, sys, warnings
warnings.simplefilter("ignore")
for name in sys.argv[1:]:
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            importlib.import_module(name)
        error = ""
    except BaseException as raised:
        error = " ".join(f"{type(raised).__name__}: {raised}".split())
    print(name, error, flush=True)
"""


def doctor_command(overrides: Overrides) -> None:
    """Print the report; a part that fails is reported in its place."""
    if overrides.args:
        raise ValueError(f"cannot read {overrides.args[0]!r}; expected no arguments")
    parts = (_versions, _devices, _precision, _renderers, _parts, _disk)
    for part in parts:
        for name, text in _attempt(part):
            print(f"{name:<11}{text}", flush=True)


def _attempt(part: Callable[[], list[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return the lines of a part of the report, or a line about its error."""
    try:
        return part()
    except Exception as error:  # the report is needed most where something is broken
        name = part.__name__.strip("_")
        return [(name, f"cannot be determined ({type(error).__name__}: {join_lines(error)})")]


def _versions() -> list[tuple[str, str]]:
    def version(package: str) -> str:
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            return f"{package} is not installed"

    return [
        ("worldloom", f"{worldloom.__version__} in {Path(worldloom.__file__).parent}"),
        ("python", f"{platform.python_version()} in {sys.prefix}, {platform.platform()}"),
        ("packages", ", ".join(map(version, PACKAGES))),
    ]


def _devices() -> list[tuple[str, str]]:
    import torch

    from worldloom.devices import bfloat16_features, usable_devices, why_no_gpu

    gpus = [
        f"{name}: {torch.cuda.get_device_name(name)}" if name.startswith("cuda") else name
        for name in usable_devices()[1:]
    ]
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    torch_uses = f"of which torch uses {torch.get_num_threads()} (threads=N)"
    bfloat16 = ", ".join(bfloat16_features()) or "none"
    return [
        ("CPU", f"{cores} cores, {torch_uses}; instructions for bfloat16: {bfloat16}"),
        ("products", _describe_products()),
        *[("GPU", gpu) for gpu in gpus or [f"none: {why_no_gpu()}"]],
    ]


def _precision() -> list[tuple[str, str]]:
    """Return what trainer.precision=auto chooses on each device, for a small and a large model."""
    import torch

    from worldloom.devices import usable_devices
    from worldloom.training.precision import LEAST_PARAMETERS, choose_precision

    lines = ["trainer.precision=auto chooses:"]
    for device in map(torch.device, usable_devices()):
        choices = dict.fromkeys(
            choose_precision(parameters, device)
            for parameters in (LEAST_PARAMETERS - 1, LEAST_PARAMETERS)
        )
        lines += [f"{precision} on {device}: {reason}" for precision, reason in choices]
    return [("precision", "\n           ".join(lines))]


def _describe_products() -> str:
    from worldloom.nn.products import SETTING, chosen_library

    library, reason = chosen_library()
    name = "oneDNN" if library == "onednn" else "torch's default library"
    return f"float32 by {name} ({reason}; {SETTING}=auto, torch or onednn)"


def _renderers() -> list[tuple[str, str]]:
    if util.find_spec("mujoco") is None:
        return [("renderers", "belong to MuJoCo, which is not installed")]
    results = {name: probe(name) for name in (*RENDERERS, "glfw")}
    lines = [f"{name} {'works' if error is None else error}" for name, error in results.items()]
    chosen = os.environ.get("MUJOCO_GL")
    lines += [f"MUJOCO_GL={chosen} is set, so only {chosen} is used"] if chosen else []
    return [("renderers", "\n           ".join(lines))]


def _parts() -> list[tuple[str, str]]:
    modules = {module: name for part in PARTS.values() for name, (module, _) in part.items()}
    found = [name for name in modules if util.find_spec(name.split(".")[0]) is not None]
    errors = import_each([name for name in found if name not in NOT_IMPORTED])
    errors |= {name: "" for name in NOT_IMPORTED if name in found}
    lines = []
    for title, part in PARTS.items():
        works = [name for name, (module, _) in part.items() if errors.get(module) == ""]
        lines.append((title, ", ".join(works) or "none"))
        for name, (module, _) in part.items():
            if errors.get(module):
                lines.append(("", f"{name} is installed but broken: {errors[module]}"))
        missing = [f"{name} [{extra}]" for name, (m, extra) in part.items() if m not in found]
        if missing:
            lines.append(("", f"not installed: {', '.join(missing)}"))
    if len(found) < len(modules):
        how = "pip install 'worldloom[EXTRA]', with the name in brackets; [suites] is all suites"
        lines.append(("install", how))
    return lines


def import_each(modules: list[str]) -> dict[str, str]:
    """Import modules in another process; return {module: its error, "" for none}."""
    errors: dict[str, str] = {}
    while left := [name for name in modules if name not in errors]:
        command = [sys.executable, "-c", IMPORTS, *left]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            ended = f"importing it ended the process with code {done.returncode}"
            printed: str | bytes = done.stdout
        except subprocess.TimeoutExpired as late:
            ended, printed = "importing it takes more than two minutes", late.stdout or ""
        text = printed.decode() if isinstance(printed, bytes) else printed
        for line in text.splitlines():
            name, _, error = line.partition(" ")
            if name in left:
                errors[name] = error
        if unanswered := [name for name in left if name not in errors]:
            errors[unanswered[0]] = ended
    return errors


def _disk() -> list[tuple[str, str]]:
    return [("disk", f"{shutil.disk_usage('.').free / 1e9:,.1f} GB free in {Path.cwd()}")]


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), doctor_command, needs_arguments=False)


if __name__ == "__main__":
    main()
