"""The command `worldloom COMMAND`, the same as `python -m worldloom.COMMAND`."""

import os
import runpy
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO

import worldloom
from worldloom import starting
from worldloom.errors import find_similar, quote

COMMANDS = {
    "run": "train a model, or continue a run (resume=...)",
    "eval": "score the model of a run in its environment",
    "export": "write a policy to an .onnx or .pt2 file that runs without worldloom",
    "view": "write a page that plays what a model sees, imagines and plans",
    "sweep": "show the state and the scores of many runs, with statistics over seeds",
    "plot": "draw the curves and the scores of runs",
    "collect": "record episodes to train on",
    "check": "check an environment before training on it",
    "bench": "time the updates of a model on this machine",
    "diagnose": "find where a NaN or infinite loss begins",
    "models": "list all models, with their sizes",
    "doctor": "show versions, devices, renderers and what can be installed",
}
USAGE = "\n".join(
    [
        "usage: worldloom COMMAND [ARGUMENTS]   (or python -m worldloom COMMAND ...)",
        "",
        *(f"  {name:<10}{phrase}" for name, phrase in COMMANDS.items()),
        "",
        "`worldloom COMMAND --help` describes a command, `worldloom --version` prints the version.",
        'Tab completion in bash: eval "$(worldloom run -sc install=bash)"',
    ]
)
# Names of other programs' commands.
OTHER_NAMES = {"train": "run", "resume": "run", "test": "eval", "list": "models"}


@starting.safe_output()
def main() -> None:
    """Run the command that the first argument names, as `python -m worldloom.COMMAND` does."""
    args = sys.argv[1:]
    starting.begin()
    _find_modules_here()
    try:
        if "-sc" in args or "--shell-completion" in args:
            _complete(args)
        elif not args or args[0] in ("-h", "--help", "help"):
            print(USAGE)
            sys.exit(0 if args else 2)
        elif args[0] == "--version":
            print(f"worldloom {worldloom.__version__}")
        elif args[0] in COMMANDS:
            sys.argv = [f"worldloom {args[0]}", *args[1:]]
            # Not an import: Lightning starts further processes of a run by the name of __main__.
            runpy.run_module(f"worldloom.{args[0]}", run_name="__main__", alter_sys=True)
        else:
            print(f"error: {_explain(args)}", file=sys.stderr)
            sys.exit(2)
    finally:
        starting.end()


def _find_modules_here() -> None:
    """Let arguments name modules in the current folder, as with `python -m worldloom`.

    The folder comes last, so that its files replace no installed module.
    """
    if "" not in sys.path and not getattr(sys.flags, "safe_path", False):
        sys.path.append("")


def _explain(args: Sequence[str]) -> str:
    """Return why the first argument is not a command, and what to write instead."""
    name = args[0]
    if "=" in name:
        return f"{name!r} is not a command; to train write: worldloom run {quote(*args)}"
    similar = find_similar(name, [*COMMANDS, *OTHER_NAMES])
    near = f" (did you mean {OTHER_NAMES.get(similar[0], similar[0])!r}?)" if similar else ""
    return f"unknown command {name!r}{near}; commands: {', '.join(COMMANDS)}"


def _complete(args: Sequence[str]) -> None:
    """Install Hydra's shell completion for `worldloom`, or answer a query of the shell.

    Hydra completes the arguments of a program without commands, so the command is removed from
    the line that the shell passes. Hydra completes no choices in folders of a group.
    """
    from worldloom.app.help import list_choices
    from worldloom.run import main as run

    program, *words = os.environ.get("COMP_LINE", "").split(" ")
    if "query=" in args[-1] and words:
        if words[0] != "run" or len(words) == 1:
            print(*(name for name in COMMANDS if len(words) == 1 and name.startswith(words[0])))
            return
        os.environ["COMP_LINE"] = " ".join([program, *words[1:]])
        group, equals, _ = words[-1].partition("=")
        if equals and (choices := list_choices(group)):
            full = (f"{group}={choice}" for choice in choices)
            print(*(choice for choice in full if choice.startswith(words[-1])))
            return
    sys.argv = ["worldloom", *(arg for arg in args if arg not in COMMANDS)]
    with redirect_stdout(StringIO()) as found:
        run()
    if "query=" in args[-1]:
        print(*(word + "=" * bool(list_choices(word)) for word in found.getvalue().split()))
    else:
        print(found.getvalue(), end="")


if __name__ == "__main__":
    main()
