"""Tests memory policies on tiny models: gradients are those of plain checkpointing, bit by bit."""

import gc
import weakref

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lctrain
from lctrain.config import MemoryConfig
from lctrain.config.optim import HOST_ADAMW
from lctrain.memory import LayerPolicy, use_policy
from lctrain.memory.optimizer import optimizer_bytes
from lctrain.memory.policy import apply_config, policies_of
from lctrain.models.low_rank import add_adapter
from tests.configs.composed import load
from tests.models.families import make_model

POLICIES = {
    "attention-kept": ("checkpoint", {"keep_attention": 2}),
    "offload": ("offload", {"keep_inputs": 0}),
    "offload-last-kept": ("offload", {"keep_inputs": 1}),
    "offload-attention": ("offload", {"keep_inputs": 0, "host_attention": 2}),
    "mixed": ("offload", {"keep_inputs": 1, "keep_attention": 1, "host_attention": 1}),
    "by-head": ("checkpoint", {"backward_by_head": True}),
    "segment": ("checkpoint", {"segment_layers": 2}),
    "segment-attention": ("checkpoint", {"segment_layers": 2, "keep_attention": 2}),
    "segment-reused": ("checkpoint", {"segment_layers": 2, "reuse_attention": 2}),
    "segment-host": ("offload", {"segment_layers": 2, "keep_inputs": 0, "host_attention": 2}),
    "segment-by-head": (
        "offload",
        {"segment_layers": 2, "host_attention": 1, "backward_by_head": True},
    ),
}


def step(model, packs):
    """Returns the gradients of a step that accumulates over packs."""
    model.zero_grad()
    torch.manual_seed(3)
    for arguments in packs:
        model(**arguments).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(one, two):
    return len(one) == len(two) > 0 and all(map(torch.equal, one, two))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["", "dropout"])
def test_gradients_are_those_of_plain_checkpointing(family, dropout, packs):
    model = make_model(family).train()
    with lctrain.patch_model(model, fused=True, loss=True, dropout=dropout):
        model(**packs[0])  # the first call checks the head by calls of its own
        use_policy(model, "checkpoint")
        expected = step(model, packs)
        for name, (policy, options) in POLICIES.items():
            handle = use_policy(model, policy, **options)
            assert same(step(model, packs), expected), name
            with torch.no_grad():  # an evaluation in between, in training mode too
                model(**packs[1])
                model.eval()(**packs[0])
            model.train()
            assert same(step(model, packs), expected), name
            if handle.store is not None:
                assert handle.store.stored_bytes == 0


def test_an_aborted_step_gives_its_slots_back(packs):
    model = make_model("llama").train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "checkpoint")
        expected = step(model, packs)
        handle = use_policy(model, "offload", keep_inputs=0, host_attention=2)
        loss = model(**packs[0]).loss
        assert handle.store.stored_bytes > 0
        del loss  # a forward without a backward
        handle.store.finish()
        assert handle.store.stored_bytes == 0

        def fail(*given):
            raise KeyboardInterrupt

        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**packs[0])
        hook.remove()
        gc.collect()
        handle.store.finish()
        assert handle.store.stored_bytes == 0
        capacity = handle.store.capacity
        assert same(step(model, packs), expected)
        assert handle.store.capacity == capacity

        # On a CPU torch's engine holds the tasks of a backward that failed, and so their layer.
        hook = model.model.layers[0].mlp.down_proj.weight.register_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(**packs[0]).loss.backward()
        hook.remove()
        assert same(step(model, packs), expected)


def test_kept_attention_is_not_computed_again(packs):
    model = make_model("llama").train()
    flops = {}
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        for name, (policy, options) in {**POLICIES, "plain": ("checkpoint", {})}.items():
            use_policy(model, policy, **options)
            with FlopCounterMode(display=False) as counter:
                model(**packs[0]).loss.backward()
            flops[name] = counter.get_flop_counts()["Global"][torch.ops.lctrain.varlen_forward]
    once = flops["plain"] / 2  # in the forward only
    kept = {name for name in flops if "attention" in name} | {"mixed", "segment-host"}
    assert {name for name, count in flops.items() if count == once} == kept
    assert flops["segment"] == 2.5 * once  # the first of two layers runs a third time


def test_hidden_dropout_draws_the_same_mask_again():
    """The hidden dropout of GPT-2 draws from torch's generator, not from a seed of ours."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5
    )
    model = GPT2LMHeadModel(config).train()
    arguments = {"input_ids": torch.arange(20)[None], "labels": torch.arange(20)[None]}
    gradients = []
    for policy in ("none", "checkpoint", "offload"):
        handle = use_policy(model, policy, **({"keep_inputs": 0} if policy == "offload" else {}))
        gradients.append(step(model, [arguments]))
        if handle is not None:
            handle.remove()
    assert same(gradients[1], gradients[0])
    assert same(gradients[2], gradients[0])


def test_adapters_of_the_first_layer_learn_under_frozen_embeddings(packs):
    from lctrain.config import AdapterConfig

    pytest.importorskip("peft")
    torch.manual_seed(1)
    model = add_adapter(make_model("llama"), AdapterConfig(rank=2, dropout=0.3)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    with lctrain.patch_model(model.get_base_model(), fused=True, loss=True):
        model(**packs[0])
        expected = step(model, packs)
        for policy, options in (("checkpoint", {}), *POLICIES.values()):
            use_policy(model, policy, **options)
            assert same(step(model, packs), expected)
    first = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A
    assert all(p.grad.abs().max() > 0 for p in first.parameters())


def test_a_copy_of_a_model_has_a_policy_of_its_own(packs):
    import copy

    model = make_model("llama").train()
    with lctrain.patch_model(model, fused=True):
        handle = use_policy(model, "offload", keep_inputs=0)
        expected = step(model, packs)
        again = copy.deepcopy(model)
        assert same(step(again, packs), expected)
        copied = vars(again)["_lctrain_memory"]
        assert copied.store is not handle.store
        copied.remove()
        assert all(layer.gradient_checkpointing for layer in model.model.layers)
        assert not any(layer.gradient_checkpointing for layer in again.model.layers)
    freed = weakref.ref(model)
    del model, handle
    gc.collect()
    assert freed() is None


def test_a_policy_can_be_removed(packs):
    model = make_model("llama").train()
    handle = use_policy(model, "offload", keep_inputs=0)
    handle.remove()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0]).loss.backward()
    assert handle.store.capacity == 0


def test_a_model_has_one_policy_at_a_time():
    model = make_model("llama").train()
    layers = model.model.layers

    def state():
        return {(x.gradient_checkpointing, "forward" in vars(x.mlp)) for x in layers}

    first = use_policy(model, "checkpoint", mlp_tokens=7)
    assert state() == {(True, True)}
    second = use_policy(model, "offload", mlp_tokens=5)
    first.remove()
    assert state() == {(True, True)}
    third = use_policy(model, "checkpoint")
    assert state() == {(True, False)}
    second.remove()
    assert state() == {(True, False)}
    use_policy(model, "none")
    assert state() == {(False, False)}
    third.remove()


def test_ranks_of_a_node_share_the_host(monkeypatch):
    from lctrain.memory import policy

    monkeypatch.setattr(policy, "free_host_bytes", lambda: 1000)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    offload = MemoryConfig(name="offload")
    assert policy.host_bytes(offload) == 800
    assert policy.host_bytes(offload, 8) == 100
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # by torchrun
    assert policy.host_bytes(offload) == 200


@pytest.mark.parametrize("gib", [1.0, 1e-6], ids=["room", "full"])
def test_states_of_the_optimizer_leave_the_rest_of_the_host_to_activations(gib):
    model = make_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    config = MemoryConfig(name="offload", keep_inputs=0, host_gib=gib)
    whole = apply_config(model, config).store.host_bytes
    assert whole == int(gib * 2**30)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = optimizer_bytes(trained, HOST_ADAMW)[1]
    assert states > 0
    found = apply_config(model, config, optimizer=HOST_ADAMW).store.host_bytes
    assert found == max(whole - states, 0)


def test_a_graph_that_is_kept_can_be_read_twice(packs):
    model = make_model("llama").train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])
        use_policy(model, "offload", keep_inputs=0, host_attention=2)
        expected = step(model, packs[:1])
        model.zero_grad()
        loss = model(**packs[0]).loss
        loss.backward(retain_graph=True)
        model.zero_grad()
        loss.backward()
    assert same([p.grad for p in model.parameters()], expected)


def test_which_layer_does_what():
    offload = MemoryConfig(name="offload", keep_inputs=1, keep_attention=1, host_attention=2)
    assert policies_of(offload, 4) == [
        LayerPolicy("host", "recompute"),
        LayerPolicy("host", "host"),
        LayerPolicy("host", "host"),
        LayerPolicy("device", "device"),
    ]
    kept = MemoryConfig(name="checkpoint", keep_attention=1)
    assert policies_of(kept, 2) == [LayerPolicy(), LayerPolicy("device", "device")]
    reused = MemoryConfig(name="checkpoint", segment_layers=3, keep_attention=2, reuse_attention=3)
    again, rebuilt = LayerPolicy("device", "rebuilt"), LayerPolicy("recompute", "rebuilt")
    last = LayerPolicy("recompute", "recompute")
    kept = [LayerPolicy("recompute", "device")] * 2
    assert policies_of(reused, 6) == [again, rebuilt, last, again, *kept]
    fewer = MemoryConfig(name="checkpoint", segment_layers=3, reuse_attention=1)
    assert policies_of(fewer, 3) == [again, last, last]


def test_a_module_gets_its_policy(make_llama):
    from lctrain.module import LongContextModule

    module = LongContextModule(make_llama(), memory={"name": "checkpoint"})
    module.configure_model()
    assert all(layer.gradient_checkpointing for layer in module.model.model.layers)
    with pytest.raises(ValueError, match=r"memory must have fields of MemoryConfig .*got layers"):
        LongContextModule(make_llama(), memory={"layers": 3})


def test_a_model_without_such_layers_is_refused():
    class Model(torch.nn.Linear):
        """A model that transformers knows nothing of."""

    with pytest.raises(ValueError, match=r"memory must be none for Model, .*got checkpoint"):
        use_policy(Model(2, 2))
    assert use_policy(Model(2, 2), "none") is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("memory.name=all",), r"memory\.name must be one of none, checkpoint, .* got 'all'"),
        (("memory=checkpoint", "memory.keep_attention=-1"), r"keep_attention must be at least 0"),
        (("memory=offload", "memory.keep_inputs=-1"), r"memory\.keep_inputs must be at least 0"),
        (
            ("memory=checkpoint", "memory.host_attention=1"),
            r"host_attention must be 0 for memory=c",
        ),
        (("memory.keep_attention=1",), r"keep_attention must be 0 for memory=none"),
        (("memory=offload", "memory.host_gib=0"), r"memory\.host_gib must be above 0 and finite"),
        (("memory=auto", "memory.mlp_tokens=0"), r"memory\.mlp_tokens must be at least 1, got 0"),
        (("memory.mlp_tokens=8",), r"memory\.mlp_tokens must be null for memory=none, got 8"),
        (
            ("memory=checkpoint", "memory.mlp_tokens=8", "trainer.precision=bf16-true"),
            r"mlp_tokens must be null with trainer\.precision=bf16-true, got 8",
        ),
        (("memory=offload", "memory.tokens=1"), r"memory\.tokens must be at least 2, got 1"),
        (("memory=checkpoint", "memory.segment_layers=0"), r"segment_layers must be at least 1"),
        (("memory=offload", "memory.reuse_attention=-1"), r"reuse_attention must be at least 0"),
        (
            ("memory=checkpoint", "memory.reuse_attention=1"),
            r"memory\.reuse_attention must be 0 without segments, got 1",
        ),
        (("memory.segment_layers=2",), r"memory\.segment_layers must be 1 for memory=none, got 2"),
        (
            ("memory=auto", "memory.backward_by_head=true"),
            r"memory\.backward_by_head must be false for memory=auto, got true",
        ),
        (("memory=checkpoint", "memory.keep_inputs=1"), r"keep_inputs must be null for memory=ch"),
        (("memory=checkpoint", "memory.host_gib=8"), r"host_gib must be null for memory=checkp"),
        (("memory.host_gib=8",), r"memory\.host_gib must be null for memory=none, .*got 8"),
    ],
)
def test_settings_that_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load(*overrides)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (
            "checkpoint",
            {"keep_attention": 3},
            r"memory\.keep_attention must be at most .* 2 layers",
        ),
        (
            "checkpoint",
            {"segment_layers": 3},
            r"memory\.segment_layers must be at most .* 2 layers",
        ),
        (
            "checkpoint",
            {"segment_layers": 2, "reuse_attention": 3},
            r"memory\.reuse_attention must be at most .* 2 layers, got 3",
        ),
        ("offload", {"keep_inputs": 3}, r"memory\.keep_inputs must be at most .* 2 layers, got 3"),
        (
            "offload",
            {"keep_attention": 1, "host_attention": 2},
            r"keep_attention \+ memory\.host_attention must be at most the model's 2 layers, got 3",
        ),
    ],
)
def test_more_layers_than_a_model_has_are_refused(policy, options, message):
    with pytest.raises(ValueError, match=message):
        use_policy(make_model("llama"), policy, **options)


def test_attention_that_is_not_ours_cannot_be_kept(packs):
    model = make_model("llama").train()
    rows = {"input_ids": packs[0]["input_ids"], "labels": packs[0]["input_ids"]}
    use_policy(model, "checkpoint", keep_attention=1)
    with pytest.raises(ValueError, match=r"memory must recompute the attention of a model that is"):
        model(**rows)
    with lctrain.patch_model(model):
        use_policy(model, "checkpoint", keep_attention=1)
        model(**packs[0]).loss.backward()


@pytest.mark.parametrize(
    ("options", "fullgraph"),
    [
        ({"keep_inputs": 0}, False),
        ({"keep_inputs": 0}, True),
        ({"keep_attention": 1, "keep_inputs": 2}, True),
        ({"segment_layers": 2, "keep_inputs": 2}, False),
    ],
)
def test_offloading_is_refused_by_name_under_torch_compile(options, fullgraph, packs):
    model = make_model("llama").train()
    rows = {name: value for name, value in packs[0].items() if name != "labels"}
    with lctrain.patch_model(model, fused=True):
        use_policy(model, "offload", **options)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        with pytest.raises((ValueError, RuntimeError), match=r"memory.* kept attention"):
            compiled(**rows)
    torch._dynamo.reset()


@pytest.mark.parametrize("policy", ["none", "checkpoint", "offload"])
def test_a_model_is_freed_with_its_policy_and_loss(policy, packs):
    """What the loss and the policy remember of a model does not keep it alive."""
    model = make_model("llama").train()
    lctrain.patch_model(model, fused=True, loss=True)
    use_policy(model, policy)
    step(model, packs)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None
