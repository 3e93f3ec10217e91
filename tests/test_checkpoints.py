"""PyTorch files read without PyTorch: the numbers PyTorch reads, and nothing is ever executed."""

import pathlib
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors

from models import GraftError
from models.checkpoints import (
    MAGIC_NUMBER,
    PROTOCOL_VERSION,
    cached_safetensors,
    file_sha256,
    read_safetensors,
    read_torch,
    torch_to_safetensors,
)

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "torch"


def pushed(value) -> bytes:
    """Pickle opcodes that leave a plain value on the stack."""
    return pickle.dumps(value, 2)[2:-1]


def forged_pickle(offset, shape, strides, count, view=None) -> bytes:
    """A state dict {"w": tensor} as torch.save pickles it, with any numbers."""
    storage = b"(" + pushed("storage") + b"ctorch\nFloatStorage\n" + pushed("0") + pushed("cpu") + pushed(count)
    storage += (pushed(view) if view else b"") + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + pushed(offset) + pushed(shape) + pushed(strides)
    return b"\x80\x02}" + pushed("w") + tensor + pushed(False) + b"}tRs."


def write_old(path, *args, numbers=(1, 2, 3, 4), **kwargs):
    parts = [pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True})]
    parts += [forged_pickle(*args, **kwargs), pickle.dumps(["0"], 2)]
    path.write_bytes(b"".join(parts) + struct.pack(f"<q{len(numbers)}f", len(numbers), *numbers))
    return path


def write_zip(path, files: dict, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("form", ["old", "zip"])
def test_every_tensor_equals_what_pytorch_reads(form):
    expected = np.load(FIXTURES / "expected.npz")
    state = read_torch(FIXTURES / f"state_dict.{form}.pth")
    assert set(state) == set(expected)
    for name, value in expected.items():
        want_type = ml_dtypes.bfloat16 if name == "bfloat16" else value.dtype
        assert (state[name].dtype, state[name].shape) == (want_type, value.shape), name
        np.testing.assert_array_equal(state[name].astype(value.dtype), value, err_msg=name)


@pytest.mark.parametrize("form", ["old", "zip"])
def test_tied_tensors_share_memory_and_cannot_be_written(form):
    state = read_torch(FIXTURES / f"state_dict.{form}.pth")
    assert np.shares_memory(state["tied_a"], state["tied_b"])
    assert np.shares_memory(state["tied_a"], state["tied_tail"])
    assert not np.shares_memory(state["tied_a"], state["float32"])
    with pytest.raises(ValueError, match="read-only"):
        state["tied_a"][0] = 1


@pytest.mark.parametrize("form", ["old", "zip"])
def test_a_training_checkpoint_is_unwrapped_to_flat_names(form):
    state = read_torch(FIXTURES / f"nested.{form}.pth")
    expected = np.load(FIXTURES / "expected.npz")
    assert set(state) == {"encoder.weight", "encoder.inner.bias"}
    np.testing.assert_array_equal(state["encoder.weight"], expected["float32"])
    np.testing.assert_array_equal(state["encoder.inner.bias"], expected["tied_a"])


@pytest.mark.parametrize("name", ["malicious.old.pth", "malicious.zip.pth", "malicious.pkl"])
def test_a_file_that_runs_code_is_refused_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraftError, match=r"tries to run code: it asks for `posix\.mkdir`"):
        read_torch(FIXTURES / name)
    assert not list(tmp_path.iterdir())
    pickle.loads((FIXTURES / "malicious.pkl").read_bytes())  # the plain unpickler does run it
    assert (tmp_path / "code_was_run").is_dir()


def test_a_pickled_module_is_refused_and_says_how_to_save_it():
    with pytest.raises(GraftError, match=r"container\.Sequential.*torch\.save\(model\.state_dict\(\), path\)"):
        read_torch(FIXTURES / "whole_module.zip.pth")


@pytest.mark.parametrize("form", ["old", "zip"])
def test_a_file_cut_off_anywhere_is_refused(form, tmp_path):
    whole = (FIXTURES / f"state_dict.{form}.pth").read_bytes()
    cut = tmp_path / "cut.pth"
    for size in [*range(0, len(whole), 53), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(GraftError, match=r"cut\.pth: "):
            read_torch(cut)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (4, (1,), (1,)),
        (2**60, (1,), (1,)),
        (0, (2, 2), (4, 1)),
        (0, (2,), (2**62,)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (-1, 2), (1, 1)),
        (0, (4,), (1, 1)),
        (0, (2.0,), (1,)),
    ],
)
def test_a_tensor_never_reaches_outside_its_storage(offset, shape, strides, tmp_path):
    path = write_old(tmp_path / "forged.pth", offset, shape, strides, 4)
    with pytest.raises(GraftError, match=r"forged\.pth: w: (reaches element|the shape)"):
        read_torch(path)


def test_a_storage_shorter_than_it_says_is_refused(tmp_path):
    with pytest.raises(GraftError, match="storage 0 has 4 elements; expected 9"):
        read_torch(write_old(tmp_path / "old.pth", 0, (9,), (1,), 9))
    files = {"a/data.pkl": forged_pickle(0, (9,), (1,), 9), "a/data/0": bytes(16)}
    with pytest.raises(GraftError, match="storage 0 has 16 bytes; expected 36"):
        read_torch(write_zip(tmp_path / "zip.pth", files))


def test_a_storage_that_is_part_of_another(tmp_path):
    path = write_old(tmp_path / "view.pth", 1, (2,), (1,), 4, view=("1", 1, 3))
    np.testing.assert_array_equal(read_torch(path)["w"], [3, 4])


def test_big_endian_archive(tmp_path):
    files = {
        "a/data.pkl": forged_pickle(0, (2, 2), (1, 2), 4),
        "a/byteorder": b"big",
        "a/data/0": struct.pack(">4f", 1, 2, 3, 4),
    }
    np.testing.assert_array_equal(read_torch(write_zip(tmp_path / "big.pth", files))["w"], [[1, 3], [2, 4]])


def test_foreign_files_are_named_as_such(tmp_path):
    foreign = tmp_path / "model.pth"
    for data in (b"", b"weights", b"\x89HDF\r\n\x1a\n", struct.pack("<q", 2) + b"{}"):
        foreign.write_bytes(data)
        with pytest.raises(GraftError, match=r"model\.pth: not a PyTorch checkpoint; expected a file that torch\.save"):
            read_torch(foreign)
    foreign.write_bytes(pickle.dumps({"w": [1, 2]}, 2))
    with pytest.raises(GraftError, match="a pickle, but not a PyTorch checkpoint"):
        read_torch(foreign)
    with pytest.raises(GraftError, match="a zip archive, but not a PyTorch checkpoint"):
        read_torch(write_zip(foreign, {"word/document.xml": b"<x/>"}))
    with pytest.raises(GraftError, match="is compressed"):
        read_torch(write_zip(foreign, {"a/data.pkl": pickle.dumps({}, 2)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(GraftError, match="holds no tensors"):
        read_torch(write_zip(foreign, {"a/data.pkl": pickle.dumps({"epoch": 3}, 2)}))
    with pytest.raises(GraftError, match="holds a list; expected a state dict"):
        read_torch(write_zip(foreign, {"a/data.pkl": pickle.dumps([], 2)}))
    with pytest.raises(GraftError, match=r"absent\.pth: cannot be read: No such file"):
        read_torch(tmp_path / "absent.pth")
    with pytest.raises(GraftError, match="cannot be read: Is a directory"):
        read_torch(tmp_path)


def test_a_pickle_cannot_reach_into_the_reader(tmp_path):
    """BUILD on a named function would set attributes of it; the next file must not notice."""
    state = pushed((None, {"__defaults__": (1,), "__code__": 5}))
    evil = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b."
    with pytest.raises(GraftError):
        read_torch(write_zip(tmp_path / "evil.pth", {"a/data.pkl": evil}))
    assert len(read_torch(FIXTURES / "state_dict.zip.pth")) == len(np.load(FIXTURES / "expected.npz"))


@pytest.mark.parametrize("form", ["old", "zip"])
def test_safetensors_hold_what_pytorch_reads(form, tmp_path):
    """float16, bfloat16, tied, strided, expanded and empty tensors, each with its own type."""
    source = FIXTURES / f"state_dict.{form}.pth"
    info = torch_to_safetensors(source, tmp_path / "model.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    expected = np.load(FIXTURES / "expected.npz")
    state = read_safetensors(tmp_path / "model.safetensors")
    assert set(state) == set(expected)
    assert info == {"file": source.name, "sha256": file_sha256(source), "tensors": len(expected)}
    for name, value in expected.items():
        want_type = ml_dtypes.bfloat16 if name == "bfloat16" else value.dtype
        assert (state[name].dtype, state[name].shape) == (want_type, value.shape), name
        np.testing.assert_array_equal(state[name].astype(value.dtype), value, err_msg=name)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"source": source.name, "sha256": info["sha256"]}


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GraftError, match="tries to run code"):
        torch_to_safetensors(FIXTURES / "malicious.zip.pth", tmp_path / "model.safetensors")
    with pytest.raises(GraftError, match="tries to run code"):
        cached_safetensors(FIXTURES / "malicious.zip.pth")
    with pytest.raises(GraftError, match=r"absent\.bin: cannot be read: No such file"):
        cached_safetensors(tmp_path / "absent.bin")
    with pytest.raises(GraftError, match=r"model\.safetensors: cannot be written"):
        torch_to_safetensors(FIXTURES / "state_dict.zip.pth", tmp_path / "absent" / "model.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["cache", "converted"]


def test_a_full_disk_leaves_no_half_conversion(small_disk, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(small_disk))
    (small_disk / "filler").write_bytes(bytes(1 << 20))  # to the last page; folders still fit
    with pytest.raises(GraftError, match="cannot be (written|made)"):
        cached_safetensors(FIXTURES / "state_dict.zip.pth")
    assert not [path for path in (small_disk / "converted").rglob("*") if path.is_file()]


def test_the_cache_finds_a_checkpoint_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    first = cached_safetensors(FIXTURES / "state_dict.zip.pth")
    copy = tmp_path / "other_name.bin"
    copy.write_bytes((FIXTURES / "state_dict.zip.pth").read_bytes())
    assert cached_safetensors(copy) == first
    assert cached_safetensors(FIXTURES / "nested.zip.pth") != first


def test_a_safetensors_file_cut_off_anywhere_is_refused(tmp_path):
    torch_to_safetensors(FIXTURES / "state_dict.zip.pth", tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for size in [*range(0, len(whole), 101), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(GraftError, match=r"cut\.safetensors: not a whole safetensors file"):
            read_safetensors(cut)
    with pytest.raises(GraftError, match=r"absent\.safetensors: cannot be read: No such file"):
        read_safetensors(tmp_path / "absent.safetensors")
