"""Names of sweeps and of their runs, made of the overrides in which they differ.

They consist of letters, digits and `. _ + -`, so they need no quotes in a shell or in Hydra. They
depend neither on the order of the overrides nor on the other runs of the sweep.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from worldloom.presets import config_dir

LONGEST_RUN, LONGEST_SWEEP = 100, 60  # characters
NUMBER = re.compile(r"[+-]?\d[\d_.]*(e[+-]?\d+)?")
# Overrides that do not describe what is trained.
ASIDE = re.compile(r"hydra[./]|search[.]|(sweep|folder|search)$")

# What a search varies; its other settings may change, or the folder is rejected.
SEARCH = re.compile(r"search=|\+*search\.space\.[\w.]+=\{")


def parse_overrides(args: Iterable[str]) -> list[Override]:
    """Parse the overrides among the arguments of a command line; Hydra's own are left out.

    Raises:
        HydraException: an argument is not a valid override.
    """
    given = [arg for arg in args if re.match(r"\+*[A-Za-z_][\w./@-]*=|~", arg)]
    parsed = OverridesParser.create().parse_overrides(given)
    return [part for part in parsed if not ASIDE.match(part.key_or_group)]


def text_of(override: Override) -> str:
    """Return the value of an override as text, without quotes; "null" for a deletion."""
    return str(override.input_line).partition("=")[2].strip("'\"") or "null"


def name_run(differs: Mapping[str, str]) -> str:
    """Return the name of a run: choices of groups, then other values, the seed last.

    differs: {key: value} of the overrides in which the runs of the sweep differ.
    """
    parts = [label(key, differs[key], differs) for key in sorted(differs, key=_rank)]
    return _shorten("-".join(parts) or "run", LONGEST_RUN)


def name_sweep(args: Sequence[str]) -> str:
    """Return the name of the sweep of a command line: its fixed values, then what it varies.

    More values of the same keys give the same name, so they extend the sweep.
    """
    try:
        parsed = {part.key_or_group: part for part in parse_overrides(args)}
    except HydraException:  # Hydra reports it
        return "sweep"
    varied = [key for key, part in parsed.items() if part.is_sweep_override()]
    fixed = sorted(parsed.keys() - varied, key=_rank)
    parts = [
        f"no_{_short(key, parsed)}"
        if parsed[key].is_delete()
        else label(key, text_of(parsed[key]), parsed)
        for key in fixed
    ]
    parts += [_clean(_short(key, parsed)) for key in sorted(varied, key=_rank)]
    parts += [_name_search(arg) for arg in args if SEARCH.match(arg)]
    return _shorten("-".join(parts) or "sweep", LONGEST_SWEEP)


def _name_search(override: str) -> str:
    """Return the part of a name for search=CHOICE, or for one setting of a search's space."""
    key, _, value = override.partition("=")
    return f"search_{_clean(value)}" if key == "search" else _clean(key.rpartition(".")[2])


def label(key: str, value: str, keys: Iterable[str] = ()) -> str:
    """Return one part of a name: "seed1", "train_ratio512", "tdmpc2_5m" or "walker-walk".

    The last part of the key is left out in front of words, which need no explanation. A choice in a
    folder of its group is written with a dot: "dreamerv3.crafter".

    keys: all keys of the name; if two have the same last part, both are written in full.
    """
    clean = _clean(value.replace("/", ".") if _is_group(key) else value)
    is_word = clean[0].isalpha() and clean.lower() not in ("true", "false", "null")
    if is_word or _is_group(key):
        return clean
    name = _clean(_short(key, keys))
    return name + ("" if clean[0].isdigit() and name[-1].isalpha() else "_") + clean


def _rank(key: str) -> tuple[bool, bool, str]:
    return key == "seed", not _is_group(key), key


def _is_group(key: str) -> bool:
    return (config_dir() / key).is_dir()


def _short(key: str, keys: Iterable[str]) -> str:
    name = key.rpartition(".")[2]
    return name if sum(other.rpartition(".")[2] == name for other in keys) < 2 else key


def _clean(text: str) -> str:
    """Return a text without characters that need quotes; a hash tells it from similar texts."""
    if NUMBER.fullmatch(text):
        return text
    clean = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._+-")
    return clean if clean == text and clean else f"{clean or 'x'}-{_hash(text)}"


def _shorten(name: str, longest: int) -> str:
    return name if len(name) <= longest else f"{name[: longest - 7]}-{_hash(name, 6)}"


def _hash(text: str, length: int = 4) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]
