"""Trains V1 with one launch and with two calls, from the same weights on the same rows."""

import copy

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

from lctrain.data import PackedDataModule, TextSource
from lctrain.recipes.differential.parity import (
    ONE_LAUNCH,
    TWO_CALLS,
    WAYS,
    YARDSTICK,
    equal_rows,
    largest_difference,
    train_rows,
)
from tests.numerics import MAX_RATIO, near


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = DiffLlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return DiffLlamaForCausalLM(config)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(64, (8, 2, 48), generator=generator))


@pytest.mark.usefixtures("float64_stays_float64")
def test_the_curves_are_equal_up_to_rounding(model, batches):
    exact = train_rows(copy.deepcopy(model).double(), batches, TWO_CALLS, "float32")
    same = train_rows(copy.deepcopy(model).double(), batches, ONE_LAUNCH, "float32")
    assert same == near(exact)
    for precision in ("float32", "bfloat16"):
        curves = {way: train_rows(copy.deepcopy(model), batches, way, precision) for way in WAYS}
        errors = {way: largest_difference(curve, exact) for way, curve in curves.items()}
        assert errors[ONE_LAUNCH] <= MAX_RATIO * max(errors[TWO_CALLS], errors[YARDSTICK])
        assert curves[ONE_LAUNCH][-1] < curves[ONE_LAUNCH][0]


def test_another_lambda_would_be_noticed(model, batches):
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.self_attn.lambda_init += 0.05
    found = train_rows(changed, batches, ONE_LAUNCH, "float32")
    expected = train_rows(copy.deepcopy(model), batches, TWO_CALLS, "float32")
    yardstick = train_rows(copy.deepcopy(model), batches, YARDSTICK, "float32")
    assert largest_difference(found, expected) > 10 * largest_difference(yardstick, expected)


def test_the_model_is_unpatched_afterwards(model, batches):
    trained = copy.deepcopy(model)
    train_rows(trained, batches[:1], ONE_LAUNCH, "float32")
    assert type(trained.model.layers[0].self_attn).__name__ == "DiffLlamaAttention"


def test_rows_are_the_tokens_of_the_packs(tmp_path):
    text = "".join(f"{number} times {number} is {number * number}\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    first, second = (
        PackedDataModule(
            TextSource(files=str(tmp_path / "a.txt")),
            max_tokens=64,
            max_document_tokens=32,
            held_out_fraction=0.0,
            vocab_size=300,
            cache_dir=tmp_path / "cache",
        )
        for _ in range(2)
    )
    first.setup()
    second.setup()
    rows = equal_rows(first, steps=3, rows=2, tokens=20)
    assert [tuple(batch.shape) for batch in rows] == [(2, 20)] * 3
    packs = iter(second.train_dataloader())
    stream = torch.cat([next(packs).input_ids[0] for _ in range(3)])
    assert torch.equal(torch.cat(rows).flatten(), stream[:120])
    with pytest.raises(ValueError, match=r"data must hold 40,000 training tokens .* Use more data"):
        equal_rows(first, steps=1000, rows=2, tokens=20)
