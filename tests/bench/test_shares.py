"""Tests lctrain-bench shares on a CPU, and the shares that it times."""

import json

import torch

from lctrain.bench import shares
from lctrain.bench.__main__ import main
from lctrain.distributed.context import ContextShard
from tests.numerics import near


def test_a_trial_measures_every_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shares, "WARM_UP", 1)
    output = tmp_path / "shares.json"
    options = ["--tiny", "--ranks", "2", "--rounds", "1", "--steps", "1"]
    assert main(["shares", *options, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert record["settings"]["ranks"] == 2
    assert [row["exchange"] for row in record["shares"]] == ["heads", "keys"]
    for row in record["shares"]:
        assert len(row["share_seconds"]) == 2
        slowest = max(row["share_seconds"])
        assert row["efficiency"] == near(row["whole_seconds"] / 2 / slowest)
    assert [row["strategy"] for row in record["steps"]] == ["auto", "fsdp2"]
    plain, sharded = (row["seconds"] for row in record["steps"])
    assert record["steps"][1]["of_plain"] == near(sharded / plain)
    printed = capsys.readouterr().out
    assert "| exchange, 2 ranks |" in printed
    assert "| plain |" in printed


def test_a_share_is_that_of_the_rank(monkeypatch):
    """Queries, keys, heads and offsets of every rank of a document of 1,024 tokens."""
    calls = []

    def attention(q, k, v, pack, **options):
        calls.append((q.shape[:2], k.shape[:2], pack.query_offsets, options["first_head"]))
        return q * k.sum() * v.sum(), None

    monkeypatch.setattr(shares, "flash_attn_pack_func", attention)
    shard = ContextShard.of([1024], 2)
    for rank in range(2):
        shares.share_call(1024, 2, 1, rank, 0.0, torch.device("cpu"))()
        queries, keys, offsets, first_head = calls.pop()
        chunks = shard.chunks[rank]
        assert queries == (512, 32)
        assert keys == (sum(chunk.stop for chunk in chunks), 8)
        assert offsets.tolist() == [chunk.start for chunk in chunks]
        assert first_head == 0
        shares.share_call(1024, 2, 2, rank, 0.0, torch.device("cpu"))()
        assert calls.pop() == ((1024, 16), (1024, 4), None, 16 * rank)


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["shares"]) == 2
    assert "needs a GPU. --tiny tries it on a CPU" in capsys.readouterr().err
