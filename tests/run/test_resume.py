"""Tests in which folders `ckpt_path` is searched, and which checkpoints are refused."""

import json
import os

import pytest

from lctrain.run.checkpoint_file import AtomicCheckpointIO
from lctrain.run.resume import NEEDED, find_checkpoint
from lctrain.run.seal import DamagedCheckpointError

STATE = {
    "state_dict": {"weight": 0},
    "optimizer_states": [{}],
    "lr_schedulers": [{}],
    "loops": {"fit_loop": {}},
    "global_step": 1,
    "pytorch-lightning_version": "2.6.0",
}
MINE = {"seed": 0, "attention": "AttentionConfig", "attention.name": "flash"}


def write(run, step, age, identity=MINE):
    """Writes a checkpoint file that is `age` seconds old."""
    path = run / "checkpoints" / f"step-{step:08d}.ckpt"
    state = STATE | {"run": {"id": run.name, "identity": identity}}
    AtomicCheckpointIO().save_checkpoint(state, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    (run / "run.json").write_text(json.dumps({"id": run.name, "identity": identity}))
    last = path.with_name("last.ckpt")
    last.unlink(missing_ok=True)
    last.symlink_to(path.name)
    return path


def test_none_and_nothing(tmp_path):
    assert find_checkpoint(None, [], tmp_path) is None
    with pytest.raises(ValueError, match=r"ckpt_path=last needs an earlier checkpoint"):
        find_checkpoint("last", [tmp_path / "c"], tmp_path)
    with pytest.raises(ValueError, match=r"must be a checkpoint file or last, got '/no/x.ckpt'"):
        find_checkpoint("/no/x.ckpt", [], tmp_path)


def test_last_is_the_own_folder_s_or_the_newest_run_s(tmp_path):
    write(tmp_path / "1", 9, age=300)
    newest = write(tmp_path / "2", 4, age=200)
    assert find_checkpoint("last", [tmp_path / "3" / "checkpoints"], tmp_path, MINE) == newest
    assert find_checkpoint(str(newest), [], tmp_path, MINE) == newest
    own = write(tmp_path / "3", 2, age=900)
    assert find_checkpoint("last", [own.parent], tmp_path, MINE) == own


def test_a_folder_is_named_with_its_newest_checkpoint(tmp_path):
    path = write(tmp_path / "1", 9, age=1)
    for folder in (path.parent, path.parent.parent):
        with pytest.raises(ValueError, match=rf"got the folder {folder}. Give its .*{path.name}"):
            find_checkpoint(str(folder), [], tmp_path)


def test_last_skips_other_runs_and_names_what_differs(tmp_path):
    other = MINE | {"attention.name": "dual_chunk", "seed": 1}
    newest = write(tmp_path / "2", 6, age=1, identity=other)
    with pytest.raises(
        ValueError,
        match=r"of others .*step-00000006.ckpt, differs: seed was 1, is 0; "
        r"attention.name was 'dual_chunk', is 'flash'",
    ):
        find_checkpoint("last", [], tmp_path, MINE)
    mine = write(tmp_path / "1", 2, age=500)
    assert find_checkpoint("last", [], tmp_path, MINE) == mine
    with pytest.raises(ValueError, match=r"seed was 1, is 0; .*without ckpt_path"):
        find_checkpoint(str(newest), [], tmp_path, MINE)


def test_last_falls_back_to_the_newest_intact_one(tmp_path, caplog):
    old, middle, new = (write(tmp_path / "1", step, age=9 - step) for step in (2, 4, 6))
    new.write_bytes(b"")
    data = bytearray(middle.read_bytes())
    data[len(data) // 2] ^= 1
    middle.write_bytes(data)
    for path, age in ((middle, 5), (new, 3)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_checkpoint("last", [], tmp_path, MINE) == old
    assert "step-00000006.ckpt is damaged: it is empty" in caplog.text
    assert "step-00000004.ckpt is damaged: its SHA-256" in caplog.text
    assert f"newest intact checkpoint, {old}" in caplog.text
    message = rf"got {middle}, which is damaged: its SHA-256 .*newest intact one is {old}"
    with pytest.raises(DamagedCheckpointError, match=message):
        find_checkpoint(str(middle), [], tmp_path, MINE)
    old.write_bytes(b"x")
    with pytest.raises(
        DamagedCheckpointError, match=r"needs an intact checkpoint, got none: .*empty"
    ):
        find_checkpoint("last", [], tmp_path, MINE)


def test_a_missing_newest_file_is_no_error(tmp_path):
    """The link `last` points to a missing file, but an older checkpoint exists."""
    old, new = write(tmp_path / "1", 2, age=9), write(tmp_path / "1", 4, age=5)
    new.unlink()
    assert find_checkpoint("last", [], tmp_path, MINE) == old


@pytest.mark.parametrize("key", NEEDED)
def test_a_checkpoint_lacks_a_part(tmp_path, key):
    """Without optimizer or schedule, a run would resume with new ones."""
    path = tmp_path / "x.ckpt"
    spoiled = [{name: value for name, value in STATE.items() if name != key}, STATE | {key: None}]
    if isinstance(STATE[key], (list, dict)):
        spoiled.append(STATE | {key: type(STATE[key])()})
    for state in spoiled:
        AtomicCheckpointIO().save_checkpoint(state, path)
        with pytest.raises(ValueError, match=rf"x.ckpt without {key}\. Give a file that"):
            find_checkpoint(str(path), [], tmp_path)
    AtomicCheckpointIO().save_checkpoint(STATE | {"run": 3}, path)
    assert find_checkpoint(str(path), [], tmp_path, MINE) == path


def test_weights_alone_are_no_checkpoint(tmp_path):
    import torch

    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x.ckpt without state_dict, optimizer_states, lr_"):
        find_checkpoint(str(tmp_path / "x.ckpt"), [], tmp_path)
