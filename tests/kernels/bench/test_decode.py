"""Tests `lctrain-bench decode` on a CPU: its record, its peers, and its options."""

import json

import pytest
import torch

from lctrain.bench.__main__ import main
from lctrain_kernels.bench import decode
from lctrain_kernels.bench.decode_peers import PEERS
from lctrain_kernels.bench.decode_prefix import tables


def test_the_command_writes_a_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PEERS, "fa4", lambda inputs, page: [lambda: inputs.q + 1.0])
    output = tmp_path / "decode.json"
    options = ["--tiny", "--layouts", "dense,page256", "--output", str(output)]
    assert main(["decode", *options]) == 0
    record = json.loads(output.read_text())
    found = {(r["layout"], r["contender"]): r for r in record["results"]}
    assert len(found) == 2 * (1 + len(PEERS)) + 3
    assert found["page256", "lctrain_shared"]["speedup"] > 0
    for key in (("dense", "lctrain"), ("page256", "lctrain"), ("dense", "sdpa_repeated")):
        assert found[key]["microseconds"] > 0
    assert "no paged caches" in found["page256", "sdpa"]["error"]
    assert "differs from PyTorch" in found["dense", "fa4"]["error"]
    assert decode.parse_config(found["dense", "lctrain"]["config"]).split_size == 64
    assert "of copies" in capsys.readouterr().out


def test_a_failure_of_ours_is_an_exit_status(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "ours", lambda *_: [lambda: torch.zeros(2, 1, 4, 16)])
    options = ["--tiny", "--layouts", "dense", "--peers", "sdpa"]
    assert decode.main([*options, "--output", str(tmp_path / "decode.json")]) == 1


def test_peers_see_the_same_cache():
    inputs = decode.draw_inputs(decode.DecodeShape(2, 64, 4, 2, 16), torch.device("cpu"))
    table = inputs.table(16)
    assert sorted(table.flatten().tolist()) == list(range(8))
    dense, paged = inputs.cache(0, 0)[0], inputs.cache(0, 16)[0]
    assert torch.equal(paged[table.sort(1)[0].long()].flatten(1, 2), dense)


@pytest.mark.parametrize(
    ("text", "message"),
    [("64x64:4", "a configuration is ROWSxKEYS"), ("64x48:4:3:512:4", "a multiple of the keys")],
)
def test_bad_configurations(text, message, capsys):
    with pytest.raises(SystemExit):
        decode.parse_arguments(["--configs", text])
    assert message in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert decode.main(["--cases", "1x8k"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["16x64:4:3:1024:4", "16x64:4:4:512:3:168:16:1", "16x64:4:3:64:0:0:32:0"]
)
def test_configurations_have_names(text):
    assert decode.config_name(decode.parse_config(text)) == text


def test_a_prefix_has_one_copy_in_shared_tables():
    shape = decode.DecodeShape(3, 320, 4, 2, 16, prefix=256)
    own, shared = tables(shape, 16)
    assert len(own.unique()) == 60
    assert len(shared.unique()) == 16 + 3 * 4
    assert (shared[:, :16] == shared[0, :16]).all()
    assert shape.cache_bytes == 4 * (256 + 3 * 64) * 2 * 16
