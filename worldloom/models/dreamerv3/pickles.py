"""Arrays in the pickle of an official checkpoint, agent.pkl, without running what it names.

An ordinary unpickler calls NumPy's functions with arguments from the file, and a forged state of an
array or a dtype crashes the interpreter. This one knows the few operations of which such a file
consists, and builds every array itself, from checked numbers and the bytes in the file.
"""

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.files import require_regular
from worldloom.memory import require_memory

# Plain containers, numbers and strings; calls of functions, and states of what they returned.
OPERATIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "POP", "POP_MARK", "DUP"),
    *("PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
    *("BYTEARRAY8",),
)
DTYPE = re.compile(r"[<>=|]?([biuf][1248]|f16)")


class _DType:
    """A numeric dtype; its state gives the order of bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not DTYPE.fullmatch(code):
            name = code if isinstance(code, str) else type(code).__name__
            raise pickle.UnpicklingError(f"it has the dtype {name}; expected one of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "=") or any(x is not None for x in state[2:5]):
            raise pickle.UnpicklingError("it has a dtype with fields or parts; expected numbers")
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array of numbers, made of the bytes in the file."""

    value: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(content, dtype, shape, "F" if fortran else "C")

    def fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Make the array, or raise UnpicklingError if shape and bytes do not fit together."""
        numbers = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
        if not numbers or type(dtype) is not _DType or type(content) not in (bytes, bytearray):
            raise pickle.UnpicklingError("it has an array without a shape, a dtype or contents")
        if (size := math.prod(shape) * dtype.value.itemsize) != len(content):
            raise pickle.UnpicklingError(
                f"an array declares {shape}, {size:,} bytes, but contains {len(content):,}"
            )
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order=order)


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.fill(content, dtype, shape, order)
    return array


# What the names in a file stand for.
FUNCTIONS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("multiarray", "_reconstruct"): lambda *_: _Array(),
    ("multiarray", "scalar"): lambda dtype, content: _from_buffer(content, dtype, (), "C"),
    ("numeric", "_frombuffer"): _from_buffer,
}
# The one in Python, whose operations can be replaced.
PythonUnpickler: Any = pickle._Unpickler


class ArrayUnpickler(PythonUnpickler):
    """Reads {"params": {name: array}} from a file; any other operation is rejected."""

    def __init__(self, path: Path) -> None:
        require_regular(path)
        require_memory(2 * path.stat().st_size, str(path))
        self.size = path.stat().st_size
        super().__init__(io.BytesIO(path.read_bytes()))

    def read_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name.

        Raises:
            Exception: any, if the file is damaged or contains anything else.
        """
        content = self.load()
        params = content.get("params") if type(content) is dict else None
        if type(params) is not dict:
            raise ValueError("it has no dict of params")
        if other := [name for name, x in params.items() if not hasattr(x, "fill")]:
            raise ValueError(f"{other[0]!r} is not an array of numbers")
        return {name: array.value for name, array in params.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Return the function for an allowed name."""
        short = re.sub(r"numpy\._?core\.", "", module)
        if (short, name) not in FUNCTIONS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return FUNCTIONS[short, name]

    def load_reduce(self) -> None:
        """Call one of the functions."""
        arguments, function = self.stack.pop(), self.stack[-1]
        if not any(function is known for known in FUNCTIONS.values()) or function is None:
            raise pickle.UnpicklingError(f"it calls a {type(function).__name__}")
        self.stack[-1] = function(*arguments)

    def load_build(self) -> None:
        """Set the state of an array or a dtype."""
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) not in (_Array, _DType):
            raise pickle.UnpicklingError(f"it sets the state of a {type(made).__name__}")
        made.__setstate__(state)

    def load_setitem(self) -> None:
        """Set an item of a dict, whose key is a string: a hash of nested tuples may never end."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], key, value)

    def load_setitems(self) -> None:
        """Set several items of a dict."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(self.stack[-1], key, value)

    def _set(self, held: Any, key: Any, value: Any) -> None:
        if type(held) is not dict or type(key) is not str:
            raise pickle.UnpicklingError(f"it has a key of type {type(key).__name__}")
        held[key] = value

    def load_bytearray8(self) -> None:
        """Read a bytearray; the original allocates the length that the file declares."""
        length = int.from_bytes(self.read(8), "little")
        if length > self.size:
            raise pickle.UnpicklingError(f"it declares {length:,} bytes, but has {self.size:,}")
        self.append(bytearray(self.read(length)))

    dispatch = {
        code: PythonUnpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in OPERATIONS)
    } | {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
