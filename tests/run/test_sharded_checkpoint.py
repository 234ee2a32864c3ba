"""Tests folders of shards: no code runs from them, and failures reach all ranks."""

import errno
import json
import pickle

import pytest
import torch

from lctrain.distributed import Topology
from lctrain.run import sharded_checkpoint
from lctrain.run.checkpoint_file import AtomicCheckpointIO
from lctrain.run.seal import MANIFEST, damage_of
from lctrain.run.shard_reader import read_shards
from lctrain.run.sharded_checkpoint import read_whole, save_sharded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8)


class OfRanks(Topology):
    """Ranks of which the others send what a test says."""

    def gather(self, value):
        return [value, self.others]


def ranks(others):
    found = OfRanks()
    object.__setattr__(found, "others", others)
    return found


def state(**values):
    weights = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in DTYPES}
    group = {"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "params": ["a"]} | values
    optimizer = {"state": {"a": {"exp_avg": torch.ones(2), "step": 3}}, "param_groups": [group]}
    return {"state_dict": weights, "optimizer_states": [optimizer], "global_step": 1}


class RunsCode:
    ran = False

    def __reduce__(self):
        return (exec, (f"from {__name__} import RunsCode; RunsCode.ran = True",))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step.ckpt"
    save_sharded(state(), path, Topology())
    assert damage_of(path) is None
    return path


def test_values_come_back(path):
    found = read_whole(path)
    expected = state()
    assert found["global_step"] == 1
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value)
        assert found["state_dict"][name].dtype == value.dtype
    group = expected["optimizer_states"][0]["param_groups"][0] | {"params": [0]}
    assert found["optimizer_states"][0]["param_groups"] == [group]


@pytest.mark.parametrize("read", [read_whole, lambda path: read_shards(path, {"a": 1})])
@pytest.mark.parametrize(
    "content",
    [pickle.dumps(RunsCode()), pickle.dumps({"a": 1}), b"", b"no pickle", pickle.dumps(print)],
    ids=["runs_code", "other", "empty", "damaged", "function"],
)
def test_no_code_runs_from_the_metadata(path, read, content):
    (path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"tensors and plain values only, got .*\.metadata with"):
        read(path)
    assert not RunsCode.ran


def test_no_code_runs_from_a_value(tmp_path):
    """Values that are not tensors are pickled among the shards."""
    path = tmp_path / "step.ckpt"
    save_sharded(state(lr=RunsCode()), path, Topology())
    RunsCode.ran = False
    with pytest.raises(ValueError, match="tensors and plain values only, got optimizer_0"):
        read_whole(path)
    assert not RunsCode.ran


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (AtomicCheckpointIO, "save_checkpoint"),
        (sharded_checkpoint, "digest_of"),
        (sharded_checkpoint, "write_manifest"),
    ],
)
def test_a_failed_write_leaves_nothing_but_the_older_folder(path, monkeypatch, owner, name):
    before = damage_of(path), sorted(path.iterdir())
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match="No space left") as error:
        save_sharded(state(), path, Topology())
    assert error.value.errno == errno.ENOSPC
    assert list(path.parent.iterdir()) == [path]
    assert (damage_of(path), sorted(path.iterdir())) == before


def test_an_error_of_another_rank_is_raised_here_too(path):
    with pytest.raises(OSError, match="quota"):
        save_sharded(state(), path, ranks(OSError(errno.EDQUOT, "quota")))
    assert list(path.parent.iterdir()) == [path]


def test_shards_on_another_file_system_are_missed(path):
    with pytest.raises(
        OSError, match=r"__1_0\.distcp, which another rank wrote, is not in .* share"
    ):
        save_sharded(state(), path, ranks({"__1_0.distcp": "0" * 64}))
    assert list(path.parent.iterdir()) == [path]


def test_the_manifest_names_every_file(path):
    names = {file.name for file in path.iterdir()} - {MANIFEST}
    assert set(json.loads((path / MANIFEST).read_text())) == names
