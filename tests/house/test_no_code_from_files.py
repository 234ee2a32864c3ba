"""Tests that reading a file of a run never executes code: no module of the packages unpickles."""

import re

from tests.house.test_architecture import SOURCES

RUNS_CODE = re.compile(
    r"pickle\.loads?\(|Unpickler\(|weights_only=False|allow_pickle=True|yaml\.(unsafe_|full_)?load\("
    r"|marshal\.loads?\(|joblib\.load\(|torch\.jit\.load\("
)


def test_nothing_unpickles():
    """Allows a checkpoint that a caller trusts explicitly by weights_only=False.

    The Unpickler of shards accepts a list of classes only: tests/run/test_sharded_checkpoint.py.
    """
    found = {m: RUNS_CODE.findall(path.read_text()) for m, path in SOURCES.items()}
    found = {module: hits for module, hits in found.items() if hits}
    ours = found.pop("lctrain.run.checkpoint_file", [])
    assert len(RUNS_CODE.findall("torch.load(path, weights_only=False)")) == 1
    assert len(ours) == 1
    assert len(found.pop("lctrain.run.shard_reader", [])) == 2  # the class, and its call
    assert "def find_class" in SOURCES["lctrain.run.shard_reader"].read_text()
    assert not found


def test_every_torch_load_says_weights_only():
    for module, path in SOURCES.items():
        for call in re.findall(r"torch\.load\(([^)]*)", path.read_text()):
            assert "weights_only" in call or call == "", module
