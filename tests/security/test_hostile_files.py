"""Files that declare more than they contain, or hold what no reader may run: each is really read.

Every reader runs in a fork with little memory and little time. It has to reject the file with one
line, which names it, and must not be ended by the operating system.
"""

import io
import os
import pickle
import pickletools
import resource
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from worldloom import create_world_model
from worldloom.app.sweep_folder import read_jobs as read_sweep
from worldloom.datasets import open_dataset
from worldloom.diagnose import diagnose
from worldloom.files import read_yaml
from worldloom.results.runs import read_jobs
from worldloom.training.checkpoint_files import DamagedCheckpoint, read_checkpoint

ROOM = 2 * 2**30  # bytes of address space beyond what the test has


def reject(call, *args, names=None):
    """Call a reader with little memory, in a fork; return the message of its ValueError."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
        try:
            said = f"accepted: {call(*args)}"
        except ValueError as error:
            said = f"ValueError: {error}"
        except BaseException as error:
            said = f"raised {type(error).__name__}: {error}"
        os.write(sending, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, errors="replace") as file:
        said = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 and said.startswith("ValueError: "), (code, said)
    assert names is None or str(names) in said, said
    return said


# Pickles ------------------------------------------------------------------------------------------

GRU = "dyn/dyngru/kernel"


class Call:
    """Is pickled as a call of a function, with a state."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def empty_array():
    return np._core.multiarray._reconstruct, np.ndarray, (0,), b"b"


def array(*state):
    """An array whose state is forged: version, shape, dtype, order, contents."""
    return Call(*empty_array(), state=state)


def params(value):
    return pickle.dumps({"params": {GRU: value}}, 4)


def raw(*parts):
    """A pickle of operations by name, with the bytes of their arguments."""
    codes = {op.name: op.code.encode("latin1") for op in pickletools.opcodes}
    return b"\x80\x04" + b"".join(codes.get(x, x) if isinstance(x, str) else x for x in parts)


OBJECT, FLOAT = np.dtype(object), np.dtype("f4")
FIELDS = np.dtype([("a", "f4"), ("b", object)])
PICKLES = {
    "object dtype": lambda: params(array(1, (1,), OBJECT, False, [1])),
    "object array of numbers": lambda: params(array(1, (1,), OBJECT, False, b"12345678")),
    "object field": lambda: params(array(1, (1,), FIELDS, False, b"1234567890123456")),
    "numeric fields": lambda: params(np.zeros(3, [("a", "f4"), ("b", "i4")])),
    "sub-array": lambda: params(array(1, (1,), np.dtype(("f4", (2,))), False, b"12345678")),
    "date": lambda: params(np.zeros(2, "M8[s]")),
    "text": lambda: params(np.array(["a", "b"])),
    "void": lambda: params(np.zeros(2, "V8")),
    "huge shape": lambda: params(array(1, (2**40, 2**20), FLOAT, False, b"1234")),
    "overflowing shape": lambda: params(array(1, (2**32, 2**32), FLOAT, False, b"")),
    "negative shape": lambda: params(array(1, (-1, -1), FLOAT, False, b"1234")),
    "shape of floats": lambda: params(array(1, (1.0,), FLOAT, False, b"1234")),
    "no shape": lambda: params(array(1, None, FLOAT, False, b"1234")),
    "too few bytes": lambda: params(array(1, (1000,), FLOAT, False, b"1234")),
    "no bytes": lambda: params(array(1, (1,), FLOAT, False, None)),
    "a list as bytes": lambda: params(array(1, (1,), FLOAT, False, [1.0])),
    "a dtype as bytes": lambda: params(array(1, (1,), FLOAT, False, FLOAT)),
    "no dtype": lambda: params(array(1, (1,), "f4", False, b"1234")),
    "short state": lambda: params(array(1, (1,))),
    "state of a dtype": lambda: params(
        Call(np.dtype, "f4", state=(3, "|", None, ("a",), {}, 8, 1, 63))
    ),
    "forged order": lambda: params(
        Call(np.dtype, "f4", state=(3, "$", None, None, None, -1, -1, 0))
    ),
    "scalar of objects": lambda: params(Call(np._core.multiarray.scalar, OBJECT, b"12345678")),
    "scalar without bytes": lambda: params(Call(np._core.multiarray.scalar, np.dtype("f8"), b"")),
    "buffer of objects": lambda: params(
        Call(np._core.numeric._frombuffer, b"1" * 8, OBJECT, (1,), "C")
    ),
    "buffer, huge": lambda: params(
        Call(np._core.numeric._frombuffer, b"1" * 8, FLOAT, (2**50,), "C")
    ),
    "builtin": lambda: params(Call(eval, "print('no')")),
    "os.system": lambda: params(Call(os.system, "true")),
    "numpy.load": lambda: params(Call(np.load, "/dev/zero")),
    "getattr": lambda: params(Call(getattr, np.dtype, "type")),
    "an unbuilt array": lambda: params(Call(*empty_array())),
    "a dtype": lambda: params(FLOAT),
    "a list": lambda: params([1.0, 2.0]),
    "not a dict": lambda: pickle.dumps([1, 2]),
    "params of a list": lambda: pickle.dumps({"params": [1]}),
    "set attributes of a function": lambda: raw(
        "GLOBAL",
        b"numpy._core.multiarray\n_reconstruct\n",
        "EMPTY_DICT",
        "BINUNICODE",
        struct.pack("<I", 12) + b"__defaults__",
        "EMPTY_TUPLE",
        "SETITEM",
        "BUILD",
        "STOP",
    ),
    "call a string": lambda: raw(
        "BINUNICODE", struct.pack("<I", 1) + b"a", "EMPTY_TUPLE", "REDUCE", "STOP"
    ),
    "memo of 4 billion": lambda: raw("NONE", "LONG_BINPUT", b"\xff\xff\xff\xff", "STOP"),
    "bytearray of a terabyte": lambda: raw("BYTEARRAY8", struct.pack("<Q", 2**40), b"1", "STOP"),
    "bytes of a terabyte": lambda: raw("BINBYTES8", struct.pack("<Q", 2**40), b"1", "STOP"),
    "frame of a terabyte": lambda: raw("FRAME", struct.pack("<Q", 2**40), b"1", "STOP"),
    "key of nested tuples": lambda: raw(
        "EMPTY_DICT", "EMPTY_TUPLE", b"\x85" * 10**5, "NONE", "SETITEM", "STOP"
    ),
    "key of shared tuples": lambda: raw(
        "EMPTY_DICT", "NONE", (b"2" + b"\x86") * 64, "NONE", "SETITEM", "STOP"
    ),
    "extension": lambda: raw("EXT1", b"\x01", "STOP"),
    "instance": lambda: raw("MARK", "INST", b"os\nsystem\n", "STOP"),
    "persistent id": lambda: raw("PERSID", b"a\n", "STOP"),
    "truncated": lambda: params(np.zeros(100))[:-50],
}


@pytest.mark.parametrize("name", PICKLES)
def test_forged_pickles_are_rejected(name, tmp_path):
    file = tmp_path / "agent.pkl"
    file.write_bytes(PICKLES[name]())
    reject(create_world_model, str(file), (4,), 2, names=file)


def test_damaged_pickles_never_crash(tmp_path):
    """Random changes: each is rejected, or gives arrays of numbers."""
    from worldloom.models.dreamerv3.pickles import ArrayUnpickler

    rng, file = np.random.default_rng(0), tmp_path / "agent.pkl"
    arrays = {GRU: np.ones((3, 4), np.float32), "b": np.float64(2), "c": np.zeros((2, 2), ">i4")}
    whole, rejected = pickle.dumps({"params": arrays}, 4), 0
    for _ in range(500):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), rng.integers(1, 6)):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            found = ArrayUnpickler(file).read_arrays()
        except Exception:
            rejected += 1
            continue
        assert all(array.dtype.kind in "biuf" for array in found.values())
    assert 100 < rejected < 500
    for protocol in (3, 4, 5):
        file.write_bytes(pickle.dumps({"params": arrays, "counters": {"n": 2**70}}, protocol))
        found = ArrayUnpickler(file).read_arrays()
        assert [*found] == [*arrays]
        for key, array in arrays.items():
            np.testing.assert_array_equal(found[key], array, strict=True)


# Declared sizes -----------------------------------------------------------------------------------


def npy(shape, dtype="<f4", data=b""):
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def write_npz(file, how=zipfile.ZIP_DEFLATED, **members):
    good = {"obs": npy((3, 2), data=bytes(24)), "actions": npy((2, 1), data=bytes(8))}
    good |= {"rewards": npy((2,), data=bytes(8)), "terminated": npy((), "|b1", b"\0")} | members
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in good.items():
            archive.writestr(f"{name}.npy", content)


NPZ = {
    "huge shape": dict(obs=npy((2**40, 4), data=bytes(8))),
    "overflowing shape": dict(obs=npy((2**40, 2**40), data=bytes(8))),
    "negative shape": dict(actions=npy((-4, -1), data=bytes(16))),
    "objects": dict(obs=npy((1,), "|O", pickle.dumps([1]))),
    "a format of the future": dict(obs=b"\x93NUMPY\x09\x00" + npy((1,))[8:]),
    "a header of code": dict(obs=npy((1,)).replace(b"(1,)", b"a.b ")),
    "a short array": dict(rewards=npy((2000,), data=bytes(8))),
    "choices up to 2**60": dict(actions=npy((2,), "<i8", struct.pack("<qq", 0, 2**60))),
    "another compression": dict(how=zipfile.ZIP_LZMA),
}


@pytest.mark.parametrize("name", NPZ)
def test_arrays_that_declare_too_much(name, tmp_path):
    write_npz(tmp_path / "000.npz", **NPZ[name])
    reject(lambda: list(open_dataset(tmp_path)), names=tmp_path)
    if "how" not in NPZ[name] and "choices" not in name:
        file = tmp_path / "params.npz"
        write_npz(file, **{GRU: next(iter(NPZ[name].values()))})
        reject(create_world_model, str(file), (4,), 2, names=file)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    """10 GB of zeros, compressed to 10 MB, which the file really contains."""
    file, size = tmp_path / "000.npz", 10 * 2**30
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("obs.npy", npy((size // 4,), data=b"0"))
    head, packer = npy((size // 4,)), zlib.compressobj(9, zlib.DEFLATED, -15)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("obs.npy")
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, head)
        data = packer.compress(head) + packer.flush()
        stored = archive.infolist()[0]
        stored.file_size, stored.compress_size = len(head) + size, len(data)  # as declared
    said = reject(lambda: list(open_dataset(tmp_path)), names=file)
    assert "available" in said or "contains" in said


def save_tensors(file, content, change=lambda pickled: pickled, how=zipfile.ZIP_STORED):
    """Write a checkpoint of which the pickle is changed."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(file, "w", how) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def shared(depth=60):
    """A list that has 2 ** depth items, for a reader that does not notice that they are shared."""
    tree = [1]
    for _ in range(depth):
        tree = [tree, tree]
    return tree


def looping():
    tree = []
    tree.append(tree)
    return tree


def nested():
    tree = []
    for _ in range(300):
        tree = [tree]
    return tree


ZEROS = torch.zeros(8)
NUMEL = (b"K\x08tq", b"\x8a\x06\0\0\0\0\0\x01tq")  # 8 -> 2**40 numbers of a storage
TENSORS = {
    "shared lists": lambda f, c: save_tensors(f, c | {"more": shared()}),
    "a list in itself": lambda f, c: save_tensors(f, c | {"more": looping()}),
    "nested lists": lambda f, c: save_tensors(f, c | {"more": nested()}),
    "an expanded tensor": lambda f, c: save_tensors(f, c | {"more": ZEROS[:1].expand(2**40)}),
    "a meta tensor": lambda f, c: save_tensors(f, c | {"more": torch.empty(2**40, device="meta")}),
    "a sparse tensor": lambda f, c: save_tensors(
        f, c | {"more": torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), [], (2**40,))}
    ),
    "a storage of 4 TB": lambda f, c: save_tensors(f, {"x": ZEROS}, lambda p: p.replace(*NUMEL)),
    "a compressed file": lambda f, c: save_tensors(f, c, how=zipfile.ZIP_DEFLATED),
    "a call": lambda f, c: save_tensors(f, c | {"more": Call(os.system, "true")}),
    "a class": lambda f, c: save_tensors(f, c | {"more": zipfile.ZipInfo()}),
    "torch's old format": lambda f, c: torch.save(c, f, _use_new_zipfile_serialization=False),
    "a pickle": lambda f, c: f.write_bytes(pickle.dumps({"model": Call(os.system, "true")})),
    "a pipe": lambda f, c: os.mkfifo(f),
    "a device": lambda f, c: f.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_declare_too_much(name, tmp_path):
    official = {"model": {"_dynamics.0.weight": ZEROS, "_Qs.params.0.weight": ZEROS}}
    ours = {"hyper_parameters": {"model": {}}, "state_dict": {}, "nonfinite": {}}
    for file, reader in (
        (tmp_path / "last.ckpt", create_world_model),
        (tmp_path / "nonfinite.ckpt", diagnose),
        (tmp_path / "official.pt", lambda path: create_world_model(str(path), (4,), 2)),
    ):
        TENSORS[name](file, official if file.suffix == ".pt" else ours)
        reject(reader, file, names=file)
    if name not in ("a pipe", "a device"):
        with pytest.raises(DamagedCheckpoint, match=r"last\.ckpt"):
            read_checkpoint(tmp_path / "last.ckpt")


def write_model(folder, change):
    model = create_world_model("dreamerv3:tiny", (4,), 2, units=4, deter=8, hidden=4, classes=2)
    model.save_pretrained(folder)
    change(folder)
    return folder


def header(text):
    return lambda folder: (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text
    )


def setting(**changes):
    def change(folder):
        file = folder / "config.yaml"
        saved = yaml.safe_load(file.read_text())
        saved["arguments"] |= changes
        file.write_text(yaml.safe_dump(saved))

    return change


F4 = b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,%d]}}'
MODELS = {
    "a header of a terabyte": lambda f: (f / "model.safetensors").write_bytes(
        struct.pack("<Q", 2**40) + b"{}"
    ),
    "a tensor of 4 TB": header(F4 % (b"1099511627776", 2**42)),
    "an overflowing shape": header(F4 % (b"4294967296,4294967296,4", 2**42)),
    "nested JSON": header(b'{"__metadata__":' + b'{"a":' * 10**5 + b"1" + b"}" * (10**5 + 1)),
    "deter": setting(deter=16_000_000),
    "deter beyond 64 bits": setting(deter=10**30),
    "a billion layers": setting(dyn_layers=10**9),
    "a billion layers of an encoder": setting(encoder={"layers": 10**9}),
    "blocks of 0": setting(blocks=0),
    "negative units": setting(units=-4),
    "units of text": setting(units="many"),
    "action_dim": setting(action_dim=2**40),
    "a huge image": setting(obs_shape=[3, 10**6, 10**6]),
    "no encoder": setting(encoder=5),
    "another class": lambda f: (f / "config.yaml").write_text("format: 3\nmodel: os.system\n"),
    "a pipe": lambda f: (
        (f / "model.safetensors").unlink(),
        os.mkfifo(f / "model.safetensors"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_declare_too_much(name, tmp_path):
    folder = write_model(tmp_path / "model", MODELS[name])
    reject(create_world_model, folder, names=folder)


TEXTS = {
    "billion laughs": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(30)),
    "merge keys": "a: &a {b: 1}\nc:\n  <<: *a\n",
    "nested brackets": "a: " + "[" * 5000 + "]" * 5000,
    "nested braces": "a: " + "{b: " * 5000 + "1" + "}" * 5000,
    "nested lines": "".join(" " * i + f"a{i}:\n" for i in range(3000)),
    "tag: call": "a: !!python/object/apply:os.system ['true']\n",
    "tag: name": "a: !!python/name:os.system\n",
    "tag: own": "%TAG ! tag:yaml.org,2002:python/\n---\na: !name:os.system\n",
    "tag: binary": "a: !!binary aGk=\n",
    "tag: set": "a: !!set {b}\n",
    "several documents": "a: 1\n---\nb: 2\n",
    "a number of a million digits": "a: " + "9" * 10**5 + "\n",
    "no UTF-8": "a: \udcff",
}


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_does_more_than_hold_data(name, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    text = (
        "env: {}\nmodel: {}\nplanner: {}\n" if not name.startswith(("several", "tag: own")) else ""
    )
    for file in (run / "config.yaml", run / "sweep.yaml", run / "scores.yaml"):
        file.write_bytes((text + TEXTS[name]).encode(errors="surrogateescape"))
    (run / "worldloom.log").touch()
    reject(read_yaml, run / "config.yaml", "fix it", names="config.yaml")
    reject(read_sweep, run, names="sweep.yaml")
    assert [job.config for job in read_jobs([tmp_path])] == [{}]


def test_pipes_and_devices_are_not_read(tmp_path):
    for name in ("config.yaml", "scores.yaml", "metrics.csv", "worldloom.log", "sweep.yaml"):
        folder = tmp_path / f"a_{name}"
        folder.mkdir()
        (folder / "worldloom.log").write_text("error: broken\n")
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert len(read_jobs([tmp_path])) == 4  # without its log, that folder is no run
    reject(read_yaml, tmp_path / "a_config.yaml" / "config.yaml", "", names="config.yaml")
    (tmp_path / "zero").symlink_to("/dev/zero")
    reject(read_yaml, tmp_path / "zero", "", names="zero")


def test_metrics_of_gigabytes_are_read_line_by_line(tmp_path):
    """A sparse file of 8 GB: the bound on its rows comes before they are read."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "worldloom.log").write_text("error: broken\n")
    (run / "metrics.csv").write_text("step,a\n1,2\n")
    os.truncate(run / "metrics.csv", 8 * 2**30)
    said = reject(read_jobs, [run], names=run / "metrics.csv")
    assert f"{8 * 2**30:,} bytes" in said and "available" in said
    (run / "metrics.csv").write_text("step,seconds\n1,2\n" + "x" * 10**6 + "\n2,3\n\0\n")
    assert len(read_jobs([run])) == 1


HDF5 = {
    "a trillion rows": dict(rows=10**12),
    "a billion pixels": dict(rows=10**5, obs=(10**5, 10**5)),
    "a long episode": dict(rows=10**7, obs=(10**5,)),
    "another file": dict(link="external"),
    "raw data elsewhere": dict(raw=True),
    "choices up to 2**60": dict(actions=2**60),
}


@pytest.mark.parametrize("name", HDF5)
def test_hdf5_that_declares_too_much(name, tmp_path):
    h5py = pytest.importorskip("h5py")
    how, file = {"rows": 4, "obs": (2,), **HDF5[name]}, tmp_path / "data.hdf5"
    rows = how["rows"]
    with h5py.File(file, "w") as data:
        for key, shape in (("rewards", ()), ("actions", (1,)), ("observations", how["obs"])):
            chunks = (min(rows, 1000), *(min(n, 10) for n in shape))
            data.create_dataset(key, (rows, *shape), "f4", chunks=chunks)
        data.create_dataset("terminals", (rows,), bool, chunks=(min(rows, 1000),))
        if "actions" in how:
            del data["actions"]
            data["actions"] = np.array([0, 1, 2, how["actions"]])
        if "link" in how:
            with h5py.File(tmp_path / "secret.h5", "w") as other:
                other["x"] = np.zeros((4, 2))
            del data["observations"]
            data["observations"] = h5py.ExternalLink("secret.h5", "x")
        if "raw" in how:
            (tmp_path / "secret.txt").write_bytes(bytes(64))
            del data["observations"]
            source = [(str(tmp_path / "secret.txt"), 0, 32)]
            data.create_dataset("observations", (4, 2), "f4", external=source)
    reject(lambda: list(open_dataset(file)), names=file)
