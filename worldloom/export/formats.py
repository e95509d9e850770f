"""Files with an exported policy: .onnx for ONNX Runtime, .pt2 for torch.export.load."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from worldloom.export.step import PolicyStep, to_output
from worldloom.files import atomic_write

METADATA = "worldloom"  # key of the metadata of an .onnx file; a .pt2 file has worldloom.json
LARGEST = 2**31 - 1  # bytes of an .onnx file
# What torch notes about the code that was traced: paths of this machine, half of a small file.
NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack")

# Methods of numpy.random.Generator that draw numbers of a distribution.
NUMPY = {
    "uniform": "random",
    "normal": "standard_normal",
    "exponential": "standard_exponential",
    "integers": "integers",
    "permutation": "permuted",
}

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def make_file(step: PolicyStep, suffix: str, metadata: Mapping[str, Any]) -> bytes:
    """Trace a policy and return the contents of its file.

    Raises:
        ImportError: the packages of the extra `export` are missing.
        ValueError: the policy cannot be traced or converted.
    """
    if suffix == ".onnx":
        _require_onnx()
    example, text = step.example, json.dumps(metadata, indent=1)
    with _explain(step.model, "traced"), _quiet(), torch.no_grad():
        program = torch.export.export(step, (example,), strict=False)
    for node in program.graph.nodes:
        for note in NOTES:
            node.meta.pop(note, None)
    if suffix == ".pt2":
        file = io.BytesIO()
        with _quiet():
            torch.export.save(program, file, extra_files={f"{METADATA}.json": text})
        return file.getvalue()
    size = sum(x.untyped_storage().nbytes() for x in program.state_dict.values())
    if size > LARGEST:
        raise ValueError(
            f"the policy has {size / 1e9:.1f} GB of weights, and an .onnx file may have 2 GB; "
            "export a .pt2 file"
        )
    outputs = ["action", *map(to_output, step.states)]
    with _explain(step.model, "converted to ONNX"), _quiet(), torch.no_grad():
        found: Any = torch.onnx.export(
            program, dynamo=True, input_names=[*example], output_names=outputs, verbose=False
        )
    for node in found.model.graph.all_nodes():
        node.metadata_props.clear()
    found.model.metadata_props[METADATA] = text
    return found.model_proto.SerializeToString()


def open_file(contents: bytes, suffix: str) -> Run:
    """Return a function that runs an exported policy, from input arrays to output arrays by name.

    ONNX Runtime uses as many threads as torch.
    """
    if suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(contents, options)
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, dict(inputs)), strict=True))
    with _quiet():
        module = torch.export.load(io.BytesIO(contents)).module()

    def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(x) for name, x in inputs.items()})
        return {name: x.numpy() for name, x in outputs.items()}

    return run


def write_file(file: Path, contents: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(file) as stream:
        stream.write(contents)


def describe_step(step: PolicyStep) -> dict[str, Any]:
    """Return the part of the metadata that describes inputs, outputs and the action."""
    inputs = [{"name": name, **_describe(x)} for name, x in step.example.items()]
    for entry in inputs:
        entry |= describe_role(step, entry["name"])
    with torch.no_grad():
        outputs = step(step.example)
    space = None if step.action_spec is None else step.action_spec.space
    action: dict[str, Any] = {"space": None if space is None else str(space)}
    if isinstance(space, spaces.Box):
        action |= {"low": space.low.tolist(), "high": space.high.tolist()}
    return {
        "inputs": inputs,
        "outputs": [{"name": name, **_describe(tensor)} for name, tensor in outputs.items()],
        "observation": {"space": str(step.obs_spec.space), "unused": list(step.obs_spec.dropped)},
        "action": action,
    }


def describe_role(step: PolicyStep, name: str) -> dict[str, Any]:
    """Return what an input of a policy is, for the metadata."""
    kind, _, key = name.partition("/")
    if kind == "obs":
        return {"kind": "observation", "key": key}
    if kind == "state":
        return {"kind": "state", "output": to_output(name)}
    if kind != "noise":
        return {"kind": name}
    draw = step.noise.list_inputs()[name]
    return {
        "kind": "noise",
        "distribution": draw.kind,
        "numpy": NUMPY[draw.kind],
        "high": draw.high or None,
    }


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"an .onnx file needs a package that cannot be imported ({error}); pip install "
            "'worldloom[export]', or export a .pt2 file, which needs none"
        ) from error


@contextlib.contextmanager
def _explain(model: Any, what: str) -> Iterator[None]:
    """Turn torch's errors, which have dozens of lines, into one line."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ValueError(
            f"the policy of {type(model).__name__} cannot be {what}: {type(error).__name__}: "
            f"{reason}; expected encode, observe and policy of tensor operations alone, without "
            "Python code that depends on values (.item(), .tolist(), if x > 0)"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the notes of torch's exporters, which are not about the model."""
    notes = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(notes),
        contextlib.redirect_stderr(notes),
    ):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)
