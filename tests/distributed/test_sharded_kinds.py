"""Tests memory policies and masked language models on two ranks with sharded parameters.

All checks read the results of one pair of processes, since each of them imports torch for seconds.
"""

from dataclasses import replace

import pytest
import torch

import lctrain
from lctrain.build import plan_memory
from lctrain.config import MemoryConfig
from lctrain.config.memory import check_tiles
from lctrain.memory.profile import profile
from lctrain.memory.shards import divided
from tests.configs.composed import load
from tests.distributed.kinds_ranks import LAYERS, MASKING, POLICIES, Kind, encoder, layers
from tests.distributed.ranks import run_ranks
from tests.float64 import built_in_float64
from tests.numerics import assert_equal_in_float64, near
from tests.test_module import one_batch
from tests.train_two_ranks import CLIP, batches
from tests.training import loader, make_trainer

WINDOWS = ((0, 2), (2, 3))  # micro-batches of the two optimizer steps


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("tests.distributed.kinds_ranks", 2, folder)
    return torch.load(folder / "found.pt", weights_only=False)


def masked_batch(packs):
    """Returns one batch that holds the masked tokens of several packs, and their labels."""
    masked = [MASKING(pack) for pack in packs]
    return replace(
        one_batch(masked),
        labels=torch.cat([pack.labels for pack in masked], 1),
        num_valid_tokens=sum(pack.num_valid_tokens for pack in masked),
    )


def one_process(module, tmp_path, join=one_batch):
    """Returns losses with norms, and the weights, of the same steps in this process."""
    packs = [join([b for rank in (0, 1) for b in batches(rank)[i:j]]) for i, j in WINDOWS]
    with built_in_float64():
        module.train_dataloader = lambda: loader(packs)
        make_trainer(tmp_path, gradient_clip_val=CLIP).fit(module)
    return module.records, {n: p.data for n, p in module.model.named_parameters()}


def assert_same_training(found, expected):
    for mine, theirs in zip(found[0], expected[0], strict=True):
        assert mine == near(theirs)
    assert_equal_in_float64(found[1], expected[1])


def test_sharded_layers_under_a_policy_train_like_one_process(found, tmp_path):
    with built_in_float64():
        module = Kind(layers(), POLICIES["checkpoint"])
    assert_same_training(found["checkpoint"], one_process(module, tmp_path))


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "tiles"])
def test_policies_have_the_bits_of_plain_checkpointing(found, name):
    (records, weights), (expected, theirs) = found[name], found["checkpoint"]
    assert records == expected
    assert all(torch.equal(weights[parameter], theirs[parameter]) for parameter in theirs)
    policies = found[name, "policies"]
    plain, *_ = found["checkpoint", "policies"]
    assert name == "checkpoint" or any(policy != plain for policy in policies)


def test_segments_of_sharded_layers_are_rebuilt(found):
    """The MLP of a layer whose output is rebuilt runs once more."""
    plain = found["checkpoint", "calls"]
    assert len(plain) == LAYERS
    for name in ("segments", "host"):
        policies = [policy.inputs for policy in found[name, "policies"]]
        more = [calls > usual for calls, usual in zip(found[name, "calls"], plain, strict=True)]
        assert more == [after == "recompute" for after in policies[1:]] + [False]


def test_tiles_of_a_sharded_mlp(found):
    assert_same_training(found["tiles"], found["checkpoint"])


def test_sharded_masked_models_train_like_one_process(found, tmp_path):
    with built_in_float64():
        module = Kind(encoder(), task="mlm")
    assert_same_training(found["mlm"], one_process(module, tmp_path, masked_batch))


def test_gathered_bfloat16_weights_take_no_tiles():
    tiles = MemoryConfig(name="offload", mlp_tokens=16)
    check_tiles(tiles, "bf16-mixed")
    check_tiles(tiles, "32-true", is_sharded=True)
    with pytest.raises(ValueError, match=r"mlp_tokens must be null with trainer.strategy=fsdp2 .*"):
        check_tiles(tiles, "bf16-mixed", is_sharded=True)


def test_the_plan_of_a_shard():
    """Shares of everything, two whole layers, and what is outside of the layers."""
    model = layers()
    lctrain.patch_model(model)
    whole = profile(model, 64)
    of_layer = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    outside = 4 * sum(p.numel() for p in model.parameters()) - LAYERS * of_layer
    extra = outside + 2 * of_layer
    assert divided(whole, model, "true", 4) == replace(
        whole,
        weights=-(-whole.weights // 4) + extra,
        gradients=-(-whole.gradients // 4) + 2 * extra,  # as they are, and to be reduced
        optimizer=-(-whole.optimizer // 4),
    )
    mixed = divided(whole, model, "bf16-mixed", 4)
    assert mixed.weights == -(-whole.weights // 4) + extra // 2


def test_the_plan_of_a_run_divides_the_states():
    settings = ("model=llama_5m", "memory=offload", "trainer.accelerator=cpu", "trainer.devices=4")
    copied, shared = (
        plan_memory(load(*settings, f"trainer.strategy={name}")).parts["optimizer"]
        for name in ("ddp", "fsdp2")
    )
    assert shared == -(-copied // 4)
