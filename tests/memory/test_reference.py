"""Tests the reference model: it does not move, on the device or in the host's memory."""

import copy

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import lctrain
from lctrain.config import MemoryConfig
from lctrain.eval.shipped import load_passkey_model
from lctrain.loss import token_log_probs
from lctrain.memory import ReferenceModel
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.reference import keep_layers_on_host

GROUPS = [([5, 6, 7, 8], [[9, 10], [11]]), ([12, 13, 14], [[15], [16, 17]])]


@pytest.fixture
def policy():
    return load_passkey_model("shipped").model


def with_adapters(policy, **settings):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, **settings)
    return peft.get_peft_model(policy, lora)


@pytest.mark.parametrize("place", ["adapters", "device", "host"])
def test_the_reference_does_not_move(policy, place):
    adapters = place == "adapters"
    if adapters:
        policy = with_adapters(policy)
    before = copy.deepcopy(policy).eval()
    memory = MemoryConfig(reference=None if adapters else place)
    reference = ReferenceModel(policy.train(), memory)
    for one, dropout in ((policy, 0.5), (before, 0.0)):
        lctrain.patch_model(one.get_base_model() if adapters else one, dropout=dropout)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.requires_grad:
                weight.add_(0.1 if "lora" in name else 0.01)
    pack = lctrain.PackedBatch.from_groups(GROUPS)
    for temperature in (1.0, 0.7):
        found = reference.log_probs(pack, temperature=temperature).log_probs
        expected = token_log_probs(before, pack, temperature=temperature).log_probs.detach()
        assert torch.equal(found, expected)
        assert not torch.equal(found, token_log_probs(policy, pack).log_probs.detach())
        assert not found.requires_grad
    assert policy.training


def weights_in(layer) -> list[int]:
    return [weight.data_ptr() for weight in layer.parameters()]


def test_only_the_layer_that_runs_has_its_weights_on_the_device(policy):
    reference = ReferenceModel(policy, MemoryConfig(reference="host"))
    pack = lctrain.PackedBatch.from_groups(GROUPS)
    reference.log_probs(pack)
    layers = checkpointed_layers(reference._copy)
    stored = [weights_in(layer) for layer in layers]
    seen = []

    def look(layer, *_):
        seen.append([weights_in(one) != at for one, at in zip(layers, stored, strict=True)])

    for layer in layers:
        layer.input_layernorm.register_forward_hook(look)
    reference.log_probs(pack)
    assert seen == [[one is layer for one in layers] for layer in layers]
    assert [weights_in(layer) for layer in layers] == stored


def test_a_layer_that_fails_gives_its_memory_back(policy, monkeypatch):
    reference = ReferenceModel(policy, MemoryConfig(reference="host"))
    pack = lctrain.PackedBatch.from_groups(GROUPS)
    expected = reference.log_probs(pack).log_probs
    layers = checkpointed_layers(reference._copy)
    stored = [weights_in(layer) for layer in layers]

    def fail(x):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            reference.log_probs(pack)
    assert [weights_in(layer) for layer in layers] == stored
    assert torch.equal(reference.log_probs(pack).log_probs, expected)


@pytest.mark.parametrize(
    ("policy_name", "reference", "on_host"),
    [
        ("none", None, False),
        ("checkpoint", None, False),
        ("offload", None, True),
        ("auto", None, True),
        ("none", "host", True),
        ("offload", "device", False),
    ],
)
def test_the_memory_policy_places_the_reference(policy_name, reference, on_host):
    assert MemoryConfig(name=policy_name, reference=reference).reference_on_host == on_host


def test_wrong_settings(policy):
    with pytest.raises(ValueError, match=r"memory\.reference must be null or one of device, host"):
        MemoryConfig(reference="disk")
    adapters = with_adapters(copy.deepcopy(policy))
    with pytest.raises(ValueError, match=r"memory\.reference must be null for a policy with adapt"):
        ReferenceModel(adapters, MemoryConfig(reference="device"))
    no_layers = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"memory\.reference must be device for Linear"):
        ReferenceModel(no_layers, MemoryConfig(reference="host"))
    lctrain.patch_model(policy)
    with pytest.raises(ValueError, match="policy must not be patched when its reference is made"):
        ReferenceModel(policy)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [9, 10, 11]},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_everything_that_adapters_train_is_switched_off(policy, settings):
    policy = with_adapters(policy, **settings)
    reference = ReferenceModel(policy)
    lctrain.patch_model(policy.get_base_model())
    pack = lctrain.PackedBatch.from_groups(GROUPS)
    before = reference.log_probs(pack).log_probs
    with torch.no_grad():
        for weight in policy.parameters():
            if weight.requires_grad:
                weight.add_(0.1)
    assert torch.equal(reference.log_probs(pack).log_probs, before)
    assert not torch.equal(token_log_probs(policy, pack).log_probs, before)


def test_weights_that_are_trained_beside_adapters(policy):
    """With adapters off, they would still change the reference."""
    unfrozen = with_adapters(copy.deepcopy(policy))
    unfrozen.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"nothing but its adapters.*1 other.*model\.norm\.weight"):
        ReferenceModel(unfrozen)
    policy.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"such as .*q_proj\.base_layer\.bias\. .*must be 'none'"):
        ReferenceModel(with_adapters(policy, bias="lora_only"))


def test_a_policy_that_fsdp2_has_sharded(policy):
    # The class is what fully_shard gives a module; it needs a process group.
    sharded = type(policy.lm_head)
    policy.lm_head.__class__ = type("Sharded", (FSDPModule, sharded), {})
    with pytest.raises(ValueError, match="must be whole when its reference is copied, got one"):
        ReferenceModel(policy)


def test_a_reference_on_the_host_follows_the_policy_to_another_device(policy):
    reference = ReferenceModel(policy, MemoryConfig(reference="host"))
    pack = lctrain.PackedBatch.from_groups(GROUPS)
    expected = reference.log_probs(pack).log_probs
    layers, other = reference._layers, torch.device("cpu", 0)  # unequal to torch.device("cpu")
    assert keep_layers_on_host(reference._copy, other, layers) is layers
    assert all(layer.device == other for layer in layers)
    assert torch.equal(reference.log_probs(pack).log_probs, expected)
    assert all(layer.device == torch.device("cpu") for layer in layers)


@pytest.mark.gpu
def test_on_a_gpu_the_layers_stay_on_the_host(policy):
    policy = policy.to("cuda", torch.bfloat16)
    pack = lctrain.PackedBatch.from_groups(GROUPS).to(torch.device("cuda"))
    places = [ReferenceModel(policy, MemoryConfig(reference=at)) for at in ("device", "host")]
    places[1].log_probs(pack.to(torch.device("cpu")))  # then it moves to the GPU
    near, far = (one.log_probs(pack).log_probs for one in places)
    assert torch.equal(near, far)
    copied = places[1]._copy
    for layer in checkpointed_layers(copied):
        assert all(w.device.type == "cpu" and w.is_pinned() for w in layer.parameters())
    assert copied.lm_head.weight.device.type == "cuda"
