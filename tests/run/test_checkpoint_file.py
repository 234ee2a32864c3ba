"""Tests checkpoint files: sealed by a checksum, and read without running code."""

import errno
import os
import random
import sys
import zipfile

import pytest
import torch

from lctrain.run.checkpoint_file import (
    ALLOWED,
    AtomicCheckpointIO,
    read_checkpoint,
)
from lctrain.run.seal import DamagedCheckpointError, damage_of

STATE = {"state_dict": {"weight": torch.arange(3000.0)}, "loops": {"a": [1, None, "x"]}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step-00000001.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    return path


def test_torch_and_zip_still_read_the_sealed_file(path):
    assert damage_of(path) is None
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert torch.equal(loaded["state_dict"]["weight"], STATE["state_dict"]["weight"])
        assert loaded["loops"] == STATE["loops"]
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_flipped_bit_is_found(path):
    """Flips bits anywhere in the archive. In the seal's label, a flip only hides the seal."""
    whole = path.read_bytes()
    numbers = random.Random(0)
    places = [0, 1, len(whole) // 2, len(whole) - 1, len(whole) - 30]
    places += [numbers.randrange(len(whole) - 80) for _ in range(60)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << numbers.randrange(8)
        path.write_bytes(flipped)
        assert damage_of(path) is not None, place


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:100] + bytes(64) + data[164:], "SHA-256"),
        (lambda data: b"not a checkpoint", "no checkpoint"),
    ],
    ids=["empty", "truncated", "overwritten", "foreign"],
)
def test_damage_is_named(path, spoil, word):
    path.write_bytes(spoil(path.read_bytes()))
    assert word in damage_of(path)


def test_files_without_a_seal_are_compared_with_their_own_sums(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(STATE, path)
    assert damage_of(path) is None
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(100.0, 110.0).numpy().tobytes())] ^= 4
    path.write_bytes(data)
    assert "CRC-32" in damage_of(path)


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_a_checkpoint_runs_no_code(tmp_path, form):
    import pickle

    path, trace = tmp_path / "x.ckpt", tmp_path / "ran"
    content = {"state_dict": {}, "evil": Evil(f"touch {trace}")}
    if form == "archive":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    for load in (read_checkpoint, AtomicCheckpointIO().load_checkpoint):
        with pytest.raises(ValueError, match=r"checkpoint must (hold tensors and plain|be a file)"):
            load(path)
    assert not trace.exists()


class Kept:
    """A class whose objects a user's callback may store in a checkpoint."""


def test_what_may_be_read_is_a_list(tmp_path, monkeypatch):
    assert ALLOWED == []
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {}, "mine": Kept()}, path)
    with pytest.raises(ValueError, match=r"got .*x.ckpt with more \(.*Kept.*ALLOWED\.$"):
        read_checkpoint(path)
    monkeypatch.setattr("lctrain.run.checkpoint_file.ALLOWED", [Kept])
    assert isinstance(read_checkpoint(path)["mine"], Kept)


class Packed(torch.Tensor):
    """A tensor that computes from tensors inside it, as torchao's states of optimizers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_tensors_of_subclasses_are_read(tmp_path, monkeypatch):
    """torch restores them only if map_location names a device."""
    monkeypatch.setattr("lctrain.run.checkpoint_file.ALLOWED", [Packed])
    path = tmp_path / "x.ckpt"
    inner = torch.arange(5.0)
    AtomicCheckpointIO().save_checkpoint({"moment": Packed(inner)}, path)
    found = AtomicCheckpointIO().load_checkpoint(path)["moment"]
    assert type(found) is Packed
    assert torch.equal(found.inner, inner)


def test_unreadable_and_foreign_files(tmp_path):
    (tmp_path / "empty.ckpt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"empty.ckpt, which is damaged"):
        read_checkpoint(tmp_path / "empty.ckpt")
    torch.save([1], tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt, which holds a list"):
        read_checkpoint(tmp_path / "other.ckpt")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    """A file size limit simulates the full disk; torch replaces that error by one of its own."""
    import resource

    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # or the limit cuts off a .pyc file
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large") as error:
            AtomicCheckpointIO().save_checkpoint(
                {"state_dict": {"weight": torch.zeros(100_000)}}, path
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
