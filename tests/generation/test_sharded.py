"""Tests lctrain.generate on two CPU ranks: sharded and copied weights, unequal work, and errors.

All checks read the results of one pair of processes, since each of them imports torch for seconds.
"""

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.numerics import assert_equal_in_float64, assert_equals_one_rank, near
from tests.train_two_ranks import make_model

RANKS = (0, 1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.generation.generate_ranks", len(RANKS), folder)
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_generation_changes_no_bit_of_training(found, strategy):
    for rank in RANKS:
        plain, rollouts = found[rank][strategy]["records"]
        assert len(plain) == 2
        assert rollouts == plain


@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_completions_are_those_of_the_whole_model(found, strategy):
    """Before the first forward pass, inside the root, and between steps, with other weights."""
    for rank in RANKS:
        pairs = found[rank][strategy]["completions"]
        assert len(pairs) == 5
        assert all(mine == whole for mine, whole in pairs)
        assert len({tuple(mine[0].log_probs) for mine, _ in pairs}) == 3


@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_recipes_with_sharded_weights_equal_copied_ones(found, stage):
    """In GRPO, both ranks sample from the whole weights, and train on what they sampled."""
    for rank in RANKS:
        sharded, copied = (found[rank][name][stage] for name in ("fsdp2", "ddp"))
        assert len(sharded) == 2
        assert sharded[0] != sharded[1]
        assert sharded == near(copied)


def test_weights_are_given_back(found):
    for rank in RANKS:
        assert found[rank]["fsdp2"]["sharded"]
        assert found[rank]["by_hand"]["sharded"]


@pytest.mark.parametrize("way", ["completions", "outer", "padded"])
def test_models_that_fully_shard_divides(found, way):
    for rank in RANKS:
        mine, whole = found[rank]["by_hand"][way]
        assert [one.token_ids for one in mine] == [one.token_ids for one in whole]


def test_the_memory_of_whole_weights_is_counted(found):
    """All parameters in float32, and those of a layer, the largest module, once more."""
    model = make_model()
    every, layer = (
        sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0])
    )
    assert {one["by_hand"]["bytes"] for one in found} == {4 * (every + layer)}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("argument", "temperature must be 0, or finite and at least 1e-06, got -1.0"),
        ("memory", "the whole weights of a sharded model must fit each GPU while it generates"),
        ("nan", "the logits of prompt 0 at generated token 0 must give a distribution"),
    ],
)
def test_all_ranks_raise_the_error_of_one(found, name, message):
    kinds, messages = zip(*(one["by_hand"][name] for one in found), strict=True)
    assert sorted(kinds) == ["OtherRankError", "ValueError"]
    assert messages[0] == messages[1]
    assert message in messages[0]


def test_a_call_after_an_error_works(found):
    assert [one["by_hand"]["after"] for one in found] == [None, None]


def test_a_part_of_a_sharded_module_is_refused(found):
    for one in found:
        kind, message = one["by_hand"]["part"]
        assert kind == "ValueError"
        assert "model.embed_tokens.weight is sharded by a module around it" in message


@pytest.mark.parametrize("name", ["log_probs", "loss"])
def test_losses_of_models_sharded_by_hand_equal_those_of_whole_ones(found, name):
    """The first call verifies the output head. Without gradients, shards are left behind."""
    for rank in RANKS:
        (values, expected), kept, gradients, mean = found[rank]["losses_by_hand"][name]
        for mine, whole in zip(values, expected, strict=True):
            assert_equal_in_float64(mine, whole)
        assert kept
        assert_equals_one_rank(gradients, mean)


@pytest.mark.parametrize("name", ["log_probs", "loss"])
def test_losses_without_gathered_weights_are_refused(found, name):
    for rank in RANKS:
        for case, group in (
            ("outer", "a module around the model"),
            ("apart", "a group of its own"),
        ):
            kind, message = found[rank]["losses_by_hand"][name, case]
            assert kind == "ValueError"
            assert f"a shard of {group}. Call the loss in the forward of" in message
