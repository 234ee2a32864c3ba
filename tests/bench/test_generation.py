"""Tests lctrain-bench generation on a CPU: figures, the floor, and a time limit."""

import json
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lctrain
from lctrain.bench import generation
from lctrain.bench.__main__ import main
from lctrain.bench.generation_runs import _figures, run_beams, run_generate_batch
from lctrain.bench.generation_yardsticks import (
    floor_seconds,
    log_prob_difference,
    make_prompts,
    prefill_flops,
)
from lctrain.bench.shapes import SHAPES, build_shape, tiny
from lctrain_kernels.bench.generation_report import generation_table
from tests.numerics import near

NAMES = "graphs,sampled,waiting,eager,invariant,padded"
SIZES = ["--requests", "3", "--shortest", "20", "--longest", "70", "--new-tokens", "10"]


@pytest.fixture
def patched_tiny():
    shape = tiny(SHAPES["llama-1b"])
    model = build_shape(shape, "sdpa", torch.device("cpu"), torch.float32).eval()
    lctrain.patch_model(model)
    return model


def test_a_trial_measures_every_case(tmp_path):
    """generate_batch is left out: on a CPU it takes minutes; another test calls it."""
    output = tmp_path / "generation.json"
    options = ["--tiny", *SIZES, "--peer-tokens", "9", "--contenders", NAMES]
    assert main(["generation", *options, "--output", str(output)]) == 0
    cases = json.loads(output.read_text())["cases"]
    assert [case["requests"] for case in cases.values()] == [3, 1]
    for case in cases.values():
        assert list(case["results"]) == NAMES.split(",")
        assert [one["new_tokens"] for one in case["results"].values()] == [10, 10, 10, 10, 10, 9]
        assert all(
            one["share_of_floors"] >= one["share_of_floor"] for one in case["results"].values()
        )
        assert all(one["tokens_per_s"] > 0 for one in case["results"].values())
        assert case["log_prob_difference"]["tokens"] == 10 * case["requests"]
        assert case["equal_completions"] == case["requests"]
        invariant = case["batch_invariant"]
        assert invariant["log_prob_difference"] == {
            "mean": 0.0,
            "largest": 0.0,
            "tokens": 10 * case["requests"],
        }
        assert case["forward_seconds"] > 0 < invariant["forward_seconds"]


@pytest.mark.parametrize("shape", ["llama-1b", "llama-135m"])
def test_beams_on_both_caches(tmp_path, monkeypatch, shape):
    """Their peak of memory counts one model."""
    built, alive = [], []

    def build(*arguments):
        model = build_shape(*arguments)
        built.append(weakref.ref(model))
        return model

    def run(*arguments):
        alive.append(sum(model() is not None for model in built))
        return run_beams(*arguments)

    monkeypatch.setattr(generation, "build_shape", build)
    monkeypatch.setattr(generation, "run_beams", run)
    output = tmp_path / "generation.json"
    options = ["--tiny", *SIZES, "--peer-tokens", "9", "--contenders", "beams_paged,beams_dynamic"]
    options += ["--shape", shape]
    assert main(["generation", *options, "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    assert (len(built), alive) == (3, [1, 1])
    case = record["cases"]["beams"]
    assert case["shape"] == tiny(generation._SHAPES[shape]).title
    assert list(case["results"]) == ["beams_paged", "beams_dynamic"]
    assert [one["new_tokens"] for one in case["results"].values()] == [9, 9]
    assert case["prompt_tokens"] == case["requests"] * case["longest_prompt"]
    for index, of in enumerate(case["results"].values()):
        of["peak_bytes"] = (index + 1) * 2**30  # as on a GPU
    text = generation_table({**record, "cases": {"beams": case}})
    assert "4 beams, patched, `DynamicCache` | " in text
    assert "`PagedCache`: 1.0 GiB; " in text


def test_the_difference_is_that_of_the_log_probs(patched_tiny):
    found = lctrain.generate(patched_tiny, [[1, 2, 3], [4]], max_new_tokens=3, temperature=0)
    wrong = [replace(one, log_probs=[x + 1.0 for x in one.log_probs]) for one in found]
    right, shifted = (log_prob_difference(patched_tiny, part) for part in (found, wrong))
    assert right["tokens"] == shifted["tokens"] == 6
    assert right["mean"] <= right["largest"] < 0.5 < shifted["mean"]


def test_no_contender_begins_after_the_limit(tmp_path, monkeypatch):
    output = tmp_path / "generation.json"
    clock = SimpleNamespace(perf_counter=iter(range(0, 10**6, 100)).__next__)
    monkeypatch.setattr("lctrain.bench.generation.time", clock)
    options = ["--tiny", *SIZES, "--contenders", "padded", "--seconds", "1"]
    assert main(["generation", *options, "--output", str(output)]) == 0
    cases = json.loads(output.read_text())["cases"]
    assert "not run after" in cases["batch"]["results"]["padded"]["error"]


def test_the_floor_counts_weights_and_caches():
    shape = tiny(SHAPES["llama-1b"])
    model = build_shape(shape, "sdpa", torch.device("cpu"), torch.float32)
    weights = sum(weight.numel() for weight in model.parameters())
    prompts = make_prompts(2, 5, 7, 256)
    assert sorted(map(len, prompts)) == [5, 7]
    stored = (6 + 8) + (7 + 9)  # two steps, each with its new token
    values = 2 * weights + stored * 2 * 2 * 2 * 16  # keys and values, layers, heads, head dim
    assert floor_seconds(model, shape, prompts, 3, 4.0) == near(values)


def test_the_floor_of_prefills_counts_products_and_pairs():
    shape = tiny(SHAPES["llama-1b"])
    model = build_shape(shape, "sdpa", torch.device("cpu"), torch.float32)
    flops = [prefill_flops(model, shape, prompts) for prompts in ([[1]], [[1, 2]], [[1], [2]])]
    one, pair, apart = flops
    table = 2 * model.lm_head.weight.numel()
    attention = 4 * len(model.model.layers) * model.config.num_attention_heads * 16
    layers = sum(weight.numel() for name, weight in model.named_parameters() if "embed" not in name)
    layers -= 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    assert one == 2 * layers + table + attention
    assert pair == 2 * one - table + attention  # one token is the head's, and sees the other one
    assert apart == 2 * one


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generation"]) == 2
    assert "lctrain-bench generation needs a GPU" in capsys.readouterr().err
    assert main(["generation", "--peer-tokens", "1"]) == 2
    assert "--peer-tokens must be at least 2, got 1" in capsys.readouterr().err


def test_a_step_of_generate_batch_counts_once_all_requests_have_a_token():
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    shape = tiny(SHAPES["llama-1b"])
    model = build_shape(shape, "sdpa", torch.device("cpu"), torch.float32).eval()
    prompts = make_prompts(3, 20, 70, shape.vocab_size)
    # By default the cache takes all memory of the machine, which takes minutes on a CPU.
    config = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=128)
    figures = run_generate_batch(model, prompts, 5, continuous_batching_config=config)
    assert figures["new_tokens"] == 5
    assert 0 < figures["prefill_seconds"] < figures["seconds"]
    decode_ms = 1000 * (figures["seconds"] - figures["prefill_seconds"])
    assert 0 < figures["step_ms"] < decode_ms


def test_seconds_beyond_the_median_step_are_recorded():
    """A capture or a compilation makes a few steps slow."""
    figures = _figures(9.0, 1.0, [2.0, 1.0, 1.0, 4.0, 1.0], 6)
    assert figures["step_ms"] == 1000.0
    assert figures["beyond_median_seconds"] == 4.0
    assert _figures(1.0, 1.0, [], 1)["beyond_median_seconds"] == 0.0
