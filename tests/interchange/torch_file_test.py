"""Files of `torch.save` without torch: the same numbers, and nothing that is in them is run."""

import argparse
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.interchange import torch_file

torch = pytest.importorskip("torch", reason="pip install -e '.[interchange-test]'")


def save(value, legacy=False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def read(content: bytes):
    return torch_file.read(io.BytesIO(content), "weights.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_every_kind_of_tensor(legacy, tmp_path):
    """Dtypes, views of a shared storage, parameters; beside them plain values."""
    t = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "views": t.t(),
        "slice": t[1:3, 2:5:2],
        "parameter": torch.nn.Parameter(t),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    names = ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors |= {name: t.to(getattr(torch, name)) for name in names}
    plain = {"list": [1, 2.5, None, True, "x"], "nested": {"layers": 6, "dropout": 0.1}}
    namespace = argparse.Namespace(arch="roberta_large", sizes=[1, 2], inner=argparse.Namespace())
    state = torch.nn.LayerNorm(3).state_dict()  # an OrderedDict with an attribute
    path = tmp_path / "file.pt"
    path.write_bytes(
        save({"model": tensors, "plain": plain, "args": namespace, "s": state}, legacy)
    )
    with path.open("rb") as file:
        found = torch_file.read(file, str(path))
    assert found["plain"] == plain
    assert found["args"] == {"arch": "roberta_large", "sizes": [1, 2], "inner": {}}
    np.testing.assert_array_equal(found["s"]["weight"], np.ones(3, np.float32))
    for name, tensor in tensors.items():
        array = found["model"][name]
        assert array.shape == tuple(tensor.shape) and array.dtype.name in str(tensor.dtype), name
        np.testing.assert_array_equal(array.astype(np.float64), tensor.detach().double().numpy())


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def with_pickle(program: bytes) -> bytes:
    """A file of torch with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    return file.getvalue()


STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)


def tensor_program(offset: int, shape: bytes, strides: bytes) -> bytes:
    arguments = STORAGE + b"K" + bytes([offset]) + shape + strides + b"\x89N"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR."


def test_the_programs_of_these_tests_are_what_torch_writes():
    array = read(with_pickle(tensor_program(1, b"K\x03\x85", b"K\x01\x85")))
    np.testing.assert_array_equal(array, [1, 2, 3])


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (pickle.dumps(Call(os.system, "exit")), r"refused \(it names posix\.system\)"),
        (pickle.dumps(Call(eval, "1")), r"it names builtins\.eval"),
        (pickle.dumps(Call(getattr, "x", "y"), 2), r"it names __builtin__\.getattr"),
        (b"ctorch\nload\n.", r"it names torch\.load"),
        (b"ctorch.storage\n_load_from_bytes\n.", "it names torch.storage._load_from_bytes"),
        (b"cargparse\nArgumentParser\n)R.", r"it names argparse\.ArgumentParser"),
        (b"ccollections\nnamedtuple\n.", r"it names collections\.namedtuple"),
        (b"ccollections\nOrderedDict.__init__\n.", "it names"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93.", "it names"),
        (b"X\x01\x00\x00\x00xQ.", "cannot be read"),
        (b"(X\x06\x00\x00\x00moduleNNtQ.", "outside the file"),
        (STORAGE.replace(b"FloatS", b"MyS") + b".", r"it names torch\.MyStorage"),
        (STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007") + b".", None),
        (tensor_program(2, b"K\x03\x85", b"K\x01\x85"), "larger than its storage"),
        (tensor_program(0, b"K\x02\x85", b"K\x04\x85"), "larger than its storage"),
        (tensor_program(0, b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "larger than its storage"),
        (tensor_program(0, b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "must be positive"),
        (tensor_program(0, b"K\x02K\x02\x86", b"K\x01\x85"), "cannot be read"),
        (b"Nr\xff\xff\xff\xff.", "entry 4294967295 of its memo comes after 1"),
        (b"\x80\x04\x8c\x03o\x1bs\x8c\x02x\n\x93.", r"names o\\x1bs\.x\\n\)"),
        (tensor_program(0, b"X\x01\x00\x00\x00a\x85", b"K\x01\x85"), "must be positive"),
    ],
)
def test_programs_are_refused(program, message):
    if message is None:  # a storage without a tensor is never read
        assert read(with_pickle(program)) == "7"
        return
    with pytest.raises(UserError, match=message) as error:
        read(with_pickle(program))
    assert "\n" not in str(error.value)


def test_a_pickle_cannot_change_what_the_next_one_is_given():
    """BUILD sets attributes of any object that a pickle holds, classes included."""
    program = b"cargparse\nNamespace\n(N}X\x05\x00\x00\x00layerK\x01st\x62."
    read(with_pickle(program))
    assert not hasattr(argparse.Namespace, "layer")
    fresh = read(save(argparse.Namespace(width=1)))
    assert fresh == {"width": 1}


def test_a_list_that_holds_itself_many_times_is_read_once():
    value = ["x"]
    for _ in range(60):
        value = [value, value]
    found = read(save(value))
    for _ in range(60):
        assert found[0] is found[1]
        found = found[0]
    assert found == ["x"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_anywhere_is_one_line(legacy):
    content = save({"a": torch.ones(30), "b": torch.ones(3)}, legacy)
    for end in range(0, len(content) - 1, 7):
        with pytest.raises(UserError, match="cannot be read") as error:
            read(content[:end])
        assert "\n" not in str(error.value)


def test_a_storage_is_not_copied_a_thousand_times():
    """Each tensor is a transposed view of one storage, and would be a copy of it."""
    t = torch.zeros(200, 200)
    assert read(save([t.t() for _ in range(2)]))[1].shape == (200, 200)
    with pytest.raises(UserError, match="many times larger than the file"):
        read(save([t.t() for _ in range(20)]))


def test_records_do_not_overlap():
    """A thousand entries of the directory may name one record."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10_000))
        archive.filelist += [archive.filelist[1]] * 3
    with pytest.raises(UserError, match=r"a zip archive, but not of torch\.save"):
        read(file.getvalue())


def legacy_file(view: bytes, count: int) -> bytes:
    """Of torch before 1.6; `view` is the pickled part of a storage that its tensor lies in."""
    head = [pickle.dumps(x, 2) for x in (torch_file.LEGACY_MAGIC, 1001, {})]
    program = tensor_program(0, b"K\x02\x85", b"K\x01\x85").replace(
        b"K\x04tQ", b"K\x04" + view + b"tQ"
    )
    tail = [pickle.dumps(["0"], 2), count.to_bytes(8, "little", signed=True)]
    return b"".join([*head, program, *tail, np.arange(4, dtype="<f4").tobytes()])


def test_older_files_are_read_or_refused():
    np.testing.assert_array_equal(read(legacy_file(b"N", 4)), [0, 1])
    for view, count in ((b"N", -5), (b"N", 2**62), (b"(X\x01\x00\x00\x001K\x02K\x02t", 4)):
        with pytest.raises(UserError, match=r"weights\.pt (cannot|holds)"):
            read(legacy_file(view, count))


def test_a_compressed_archive_is_refused():
    """A small record could then unfold to any size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(UserError, match=r"a zip archive, but not of torch\.save"):
        read(file.getvalue())
