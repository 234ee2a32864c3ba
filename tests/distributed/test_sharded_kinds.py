"""Tests memory policies, masked models and adapters on two ranks with sharded parameters.

All checks read the results of one pair of processes, since each of them imports torch for seconds.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import lctrain
from lctrain.build import plan_memory
from lctrain.callbacks import LengthPerplexity
from lctrain.config import MemoryConfig
from lctrain.config.memory import check_tiles
from lctrain.memory.profile import profile
from lctrain.memory.shards import divided
from lctrain.models.low_rank import adapter_state
from lctrain.run.sharded_checkpoint import AnyCheckpointIO, read_whole
from tests.configs.composed import load
from tests.distributed.kinds_ranks import (
    HELD_OUT,
    LAYERS,
    MASKING,
    POLICIES,
    Kept,
    Kind,
    SaveFirst,
    adapted,
    encoder,
    layers,
    masked_perplexity,
)
from tests.distributed.ranks import run_ranks
from tests.float64 import built_in_float64
from tests.numerics import assert_equal_in_float64, near
from tests.test_module import one_batch
from tests.train_two_ranks import CLIP, batches
from tests.training import loader, make_trainer

WINDOWS = ((0, 2), (2, 3))  # micro-batches of the two optimizer steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with checkpoints of one process, and what two ranks have written."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("lora", "dora"):
        with built_in_float64():
            module = Kind(adapted(name == "dora"))
            module.train_dataloader = lambda: loader(joined())
            saves = SaveFirst(folder / f"{name}-file.ckpt")
            make_trainer(folder, [saves], gradient_clip_val=CLIP).fit(module)
    run_ranks("tests.distributed.kinds_ranks", 2, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=False)


def masked_batch(packs):
    """Returns one batch that holds the masked tokens of several packs, and their labels."""
    masked = [MASKING(pack) for pack in packs]
    return replace(
        one_batch(masked),
        labels=torch.cat([pack.labels for pack in masked], 1),
        num_valid_tokens=sum(pack.num_valid_tokens for pack in masked),
    )


def joined(join=one_batch):
    """Returns a batch for every optimizer step, with the packs of both ranks."""
    return [join([b for rank in (0, 1) for b in batches(rank)[i:j]]) for i, j in WINDOWS]


def one_process(module, tmp_path, join=one_batch):
    """Returns losses with norms, and the weights, of the same steps in this process."""
    with built_in_float64():
        module.train_dataloader = lambda: loader(joined(join))
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


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_sharded_adapters_train_like_one_process(found, tmp_path, name):
    with built_in_float64():
        module = Kind(adapted(name == "dora")())
    assert_same_training(found[name], one_process(module, tmp_path))
    assert found[name, "trained"]
    assert all(".lora_" in trained for trained in found[name, "trained"])


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_sharded_adapters_resume(found, folder, name):
    """The same layout has the same bits; a file of one process trains like it."""
    records, weights = found[name]
    again, restored = found[name, "resumed"]
    assert again == records[1:]
    assert all(torch.equal(restored[key], weights[key]) for key in weights)
    assert_same_training(found[name, "from a file"], (records[1:], weights))
    stored = read_whole(folder / f"{name}.ckpt")["state_dict"]
    assert stored
    assert all(".lora_" in key and "base_layer" not in key for key in stored)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_one_process_goes_on_from_sharded_adapters(found, folder, tmp_path, name):
    with built_in_float64():
        module = Kind(adapted(name == "dora"))
        module.train_dataloader = lambda: loader(joined()[::-1])  # goes on with the second step
        trainer = make_trainer(tmp_path, gradient_clip_val=CLIP, plugins=[AnyCheckpointIO()])
        trainer.fit(module, ckpt_path=folder / f"{name}.ckpt", weights_only=True)
    assert len(module.records) == 1
    assert module.records[-1] == near(found[name][0][-1])


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_exports_of_sharded_adapters(found, folder, name):
    """Adapters alone are what peft loads; merged weights have the bits of peft's own merge."""
    with built_in_float64():
        model = adapted(name == "dora")()
        weights = found[name][1]
        model.load_state_dict(weights, strict=True)
        expected = {key: value.clone() for key, value in adapter_state(model).items()}
        merged = dict(model.merge_and_unload(safe_merge=True).named_parameters())
    stored = load_file(folder / name / "adapter_model.safetensors")
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in stored)
    whole = load_file(folder / f"{name}-merged" / "model.safetensors")
    assert not (folder / f"{name}-merged" / "adapter_config.json").exists()
    assert whole.keys() == merged.keys() == found[name, "merged"].keys()
    for key, value in merged.items():
        assert torch.equal(whole[key], value)
        assert torch.equal(found[name, "merged"][key], value)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_ranks_that_share_documents_measure_what_one_process_does(found, tmp_path, name):
    with built_in_float64():
        module = Kind(layers)
        module.train_dataloader = lambda: loader(joined())
        logger = Kept()
        callback = LengthPerplexity([8, 16], every_n_steps=2, max_tokens=48, held_out=HELD_OUT)
        trainer = make_trainer(tmp_path, [callback], gradient_clip_val=CLIP, logger=logger)
        trainer.fit(module)
    expected = [(step, kept) for step, kept in logger.metrics if "val/perplexity_8" in kept]
    assert len(expected) == len(found["measured", name]) == 1
    for (step, kept), (other, theirs) in zip(expected, found["measured", name], strict=True):
        assert step == other
        assert theirs == near(kept)


def test_ranks_that_share_masked_documents(found, tmp_path):
    with built_in_float64():
        module = Kind(encoder(), task="mlm")
        one_process(module, tmp_path, masked_batch)
        expected = masked_perplexity(module.model)
    for row, theirs in zip(expected, found["masked"], strict=True):
        assert theirs == near(row)


def test_other_adapters_are_refused(found):
    for name in ("refused", "refused-file"):
        assert found[name].startswith("checkpoint must hold adapters of this model's targets and ")


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
        accumulates=True,  # shares of gradients exist throughout the step
        head_dim=0,  # no time is expected
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
