"""Runs the dual chunk extension recipe at its tiny scale, from training to the last plot."""

import csv
import json
from pathlib import Path

import pytest
import torch

from lctrain import kernels
from lctrain.eval import METHODS
from lctrain.recipes.dual_chunk_extension import stages, table
from lctrain.recipes.dual_chunk_extension.__main__ import main
from lctrain.recipes.dual_chunk_extension.continuation import _smooth
from lctrain.recipes.dual_chunk_extension.experiment import Experiment
from lctrain.recipes.dual_chunk_extension.misses import at_most, misses
from lctrain.recipes.dual_chunk_extension.published import published_gradient
from lctrain.recipes.dual_chunk_extension.scale import SCALES
from lctrain.schemas import TextData
from tests.numerics import assert_equal_in_float64, assert_far_apart, near, near_roundings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_experiment_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    main(["--scale", "tiny", "--output", str(tmp_path / "out")])
    out = tmp_path / "out"
    train = json.loads((out / "train.json").read_text())
    assert (train["steps"], train["device"]) == (4, "CPU")
    perplexity = json.loads((out / "perplexity" / "perplexity_by_method.json").read_text())
    assert perplexity["window"] == 128
    assert {row["length"] for row in perplexity["rows"]} == {128, 256, 512, 1024, 2048}
    assert {row["method"] for row in perplexity["rows"]} == set(METHODS)
    passkey = json.loads((out / "passkey" / "passkey_retrieval.json").read_text())
    assert len(passkey["rows"]) == len(METHODS) * 5 * 2
    continuation = json.loads((out / "continuation.json").read_text())
    assert 0.98 < continuation["ratio_at_step_0"] < 1.02
    runs = continuation["runs"]
    # the mean over at most 2048 tokens, once more rounded in every addition
    first = near_roundings(runs["published"]["train"][0], 2 * 2048)
    assert runs["exact"]["train"][0] == first
    with (out / "continuation.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    for plot in ("continuation", "perplexity/perplexity_by_method", "passkey/passkey_retrieval"):
        assert (out / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_folder_is_needed_by_the_later_stages(tmp_path):
    with pytest.raises(ValueError, match=r"without the folder `model`. Run the stage train first"):
        Experiment(tmp_path, SCALES["tiny"]).data()


def test_an_evaluation_goes_on_after_its_last_cell(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(stages, "evaluate", runs.append)
    monkeypatch.setattr(Experiment, "data", lambda self: TextData(files=("text.txt",)))
    folder = tmp_path / "passkey"
    folder.mkdir()
    (folder / "cells.jsonl").write_text('{"identity": {}}\n')  # stopped before its first cell
    stages.find_passkeys(Experiment(tmp_path, SCALES["tiny"]))
    assert not folder.exists()
    folder.mkdir()
    (folder / "cells.jsonl").write_text('{"identity": {}}\n{"items": []}\n')
    stages.find_passkeys(Experiment(tmp_path, SCALES["tiny"]))
    assert [run.resume for run in runs] == [None, str(folder)]


def test_the_published_gradient_is_in_place_inside_only():
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 10, 40], dtype=torch.int32)
    options = {"inv_freq": torch.tensor([1.0, 0.5, 0.2, 0.1]), "chunk_size": 7, "local_size": 2}
    exact = kernels.dual_chunk_attn_varlen_func

    def output_and_gradient():
        out = kernels.dual_chunk_attn_varlen_func(q, k, v, cu, 30, **options, softmax_scale=0.4)
        return out.detach(), torch.autograd.grad(out.square().sum(), q)[0]

    out, gradient = output_and_gradient()
    with published_gradient():
        published, other = output_and_gradient()
    assert kernels.dual_chunk_attn_varlen_func is exact
    assert_equal_in_float64(published, out)
    assert_far_apart(other, gradient)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout_p", 0.1),
        ("logit_scale", torch.ones(2)),
        ("return_lse", True),
        ("backend", "triton"),
        ("cu_seqlens_k", torch.tensor([0, 11, 40], dtype=torch.int32)),
        ("window_size", (3, 0)),
    ],
)
def test_what_the_published_gradient_cannot_honour_is_refused(name, value):
    q, k, v = (torch.randn(40, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 10, 40], dtype=torch.int32)
    options = {"inv_freq": torch.tensor([1.0, 0.5, 0.2, 0.1]), "chunk_size": 7, "local_size": 2}
    harmless = {"document_ids": torch.tensor([5, 6], dtype=torch.int32), "cu_seqlens_k": cu.clone()}
    with published_gradient():
        out = kernels.dual_chunk_attn_varlen_func(q, k, v, cu, 30, **options)
        again = kernels.dual_chunk_attn_varlen_func(q, k, v, cu, 30, **options, **harmless)
        assert torch.equal(out, again)
        with pytest.raises(ValueError, match=f"{name} must be left out for the published gradient"):
            kernels.dual_chunk_attn_varlen_func(q, k, v, cu, 30, **options, **{name: value})


def test_smoothing_begins_at_the_first_value():
    assert _smooth([3.0, 3.0, 3.0]) == near([3.0, 3.0, 3.0])
    assert _smooth([3.0, 1.0])[1] < 3.0


def test_the_readme_names_the_command():
    readme = (ROOT / "recipes" / "dual_chunk_extension" / "README.md").read_text()
    assert "python -m lctrain.recipes.dual_chunk_extension" in readme


def test_the_readme_has_the_tables_of_the_records():
    assert table.tables() in table.README.read_text()
    assert table.PROGRAM in table.README.read_text()


def test_the_tables_name_every_method_of_a_run_and_the_best_at_eight_windows(tmp_path):
    record = {"device": "GPU X", "torch": "2.11", "date": "2026-12-01"}
    record |= {"steps": 2000, "held_out_loss": [9.125, 2.5]}
    (tmp_path / "train.json").write_text(json.dumps(record))
    losses = ["method,length,perplexity,ratio_to_window,tokens,documents"]
    keys = ["method,length,depth,found,keys,accuracy"]
    for method, found in (("plain", 1), ("dual_chunk_yarn", 19)):
        for length in (1024, 8192):
            losses.append(f"{method},{length},{length / 100},{length / 1024},5000,3")
            keys += [f"{method},{length},0.0,20,20,1.0", f"{method},{length},0.5,{found},20,0.5"]
    (tmp_path / "perplexity_by_method.csv").write_text("\n".join(losses))
    (tmp_path / "passkey_retrieval.csv").write_text("\n".join(keys))
    assert "near both ends" not in table.tables({tmp_path: "A run"})
    (tmp_path / "passkey_ends.csv").write_text("\n".join(keys))
    text = table.tables({tmp_path: "A run"})
    assert "Measured on one GPU X, torch 2.11, 2026-12-01." in text
    assert "**Perplexity** of 5,000 tokens of 3 held-out documents" in text
    assert "| tokens | plain | dual_chunk_yarn |" in text
    assert "| 8,192 | 81.92 (8.00) | 81.92 (8.00) |" in text
    assert "| dual_chunk_yarn | 98% | 98% |" in text
    assert "from most to fewest keys: dual_chunk_yarn 98%, plain 52%." in text
    assert "At its worst depth, 0.5, dual_chunk_yarn finds 95%." in text
    assert "| 8 | 20 of 20 | 19 of 20 |" in text
    assert "At 8 windows dual_chunk_yarn finds 39 of 40 keys, 98%." in text
    assert "explain the distance" not in text  # it is above what it should find
    assert "### A run" in text
    assert "2,000 steps took the held-out loss from 9.12 to 2.50." in text
    assert "**Keys near both ends of the text**, of 20 in each cell:" in text
    assert "| depth | windows | 0.0 | 0.5 |" in text
    assert "| dual_chunk_yarn | 8 | 20 | 19 |" in text


def test_misses_are_given_by_depth_with_what_chance_would_do():
    rows = [
        {"method": name, "length": str(length), "depth": str(depth), "found": str(n), "keys": "4"}
        for name, at_eight in (("yarn", (1, 4, 4)), ("plain", (0, 0, 0)))
        for length, found in ((16, (4, 4, 3)), (128, at_eight))
        for depth, n in zip((0.0, 0.5, 1.0), found, strict=True)
    ]
    table_of, said = misses(rows, "yarn", 128, 16)
    assert table_of.splitlines()[-1] == "| 8 | 1 of 4 | 4 of 4 | 4 of 4 |"
    assert "yarn finds 9 of 12 keys, 75%" in said
    assert "The 95 % interval (Wilson, keys as independent draws) is 47% to 91%" in said
    # three misses avoid 8 of 12 keys in 4 of 220 ways, for each of three choices of two depths
    assert "at most 9 of 12 with probability 0.11, so sampling alone may explain" in said
    assert "At one window it finds 11 of 12." in said
    assert "The 3 misses lie at 1 of 3 depths: 3 at depth 0.0 (128 tokens before" in said
    assert "leave any 2 depths whole with a probability of at most 5.5e-02" in said
    said = misses(rows, "plain", 128, 16)[1]
    assert "0 of 12 with probability below 0.005, so sampling alone does not explain" in said


def test_the_binomial_tail_is_the_sum_of_its_terms():
    assert at_most(3, 3, 0.9) == near_roundings(1.0, 8)
    assert at_most(0, 3, 0.9) == near_roundings(0.1**3, 8)
    assert at_most(2, 3, 0.9) == near_roundings(1 - 0.9**3, 8)
