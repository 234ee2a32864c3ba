"""Tests gradients in the memory of rebuilt queries, keys and values: when, and with which bits."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import lctrain
from lctrain.loss import causal_lm_loss
from lctrain.memory import LayerCheckpoints, LayerPolicy, plan, use_policy
from lctrain.memory.peaks import layer_peaks
from lctrain.memory.profile import profile
from lctrain.memory.tracker import Tracker
from lctrain_kernels import operators
from lctrain_kernels.gluon import support
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.varlen.operators import Operands, _pytorch_overwrites
from tests.memory.test_policy import POLICIES, same, step
from tests.models.families import make_model

INTO = torch.ops.lctrain.varlen_backward_into.default
NEW = torch.ops.lctrain.varlen_backward.default


class Backwards(TorchDispatchMode):
    """Notes, for every backward of attention, the operands that it overwrites."""

    def __init__(self):
        super().__init__()
        self.overwritten = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (INTO, NEW):
            operands, into = args[2:5], args[-3:] if func is INTO else [None] * 3
            pairs = zip("qkv", operands, into, strict=True)
            self.overwritten.append(
                "".join(
                    name
                    for name, x, to in pairs
                    if to is not None and to.data_ptr() == x.data_ptr()
                )
            )
        return func(*args, **(kwargs or {}))


def overwritten(model, arguments):
    """Returns the operands that the backward of every layer overwrites, from the last layer on."""
    with Backwards() as backwards:
        model(**arguments).loss.backward()
    model.zero_grad()
    return backwards.overwritten


@pytest.fixture
def llama(packs):
    model = make_model("llama").train()
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**packs[0])  # the first call checks the head by calls of its own
        yield model


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_gradients_are_those_of_transformers_own_checkpointing(family, packs):
    model = make_model(family).train()
    with lctrain.patch_model(model, fused=True, loss=True, dropout=0.3):
        model(**packs[0])
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert set(overwritten(model, packs[0])) == {""}
        expected = step(model, packs)
        for name, (policy, options) in {**POLICIES, "checkpoint": ("checkpoint", {})}.items():
            use_policy(model, policy, **options)
            with Backwards() as backwards:
                found = step(model, packs)
            assert same(found, expected), name
            if "by-head" not in name:
                # Phi-3's values are a view of the product that makes queries, keys and values.
                assert set(backwards.overwritten) == {"qk" if family == "phi3" else "qkv"}, name


def test_the_backward_by_heads_takes_no_memory_for_gradients(llama, packs, monkeypatch):
    found = {}
    use_policy(llama, "checkpoint", backward_by_head=True)

    original = operators.run_by_head

    def run(*given):
        results = original(*given)
        call = given[1]
        found.setdefault("free", []).append(set(given[4]))
        for name, result in zip("qkv", results[:3], strict=True):
            found.setdefault("same", []).append(call[name].data_ptr() == result.data_ptr())
        return results

    monkeypatch.setattr(operators, "run_by_head", run)
    llama(**packs[0]).loss.backward()
    assert found == {"free": [set("qkv")] * 2, "same": [True] * 6}


def keep_outputs(model, name, kept):
    """Hooks a projection of every layer so that `kept` gets its outputs."""
    layers = model.model.layers
    return [
        getattr(layer.self_attn, name).register_forward_hook(lambda *given: kept.append(given[-1]))
        for layer in layers
    ]


def test_what_a_hook_keeps_is_not_overwritten(llama, packs):
    use_policy(llama, "checkpoint")
    kept = []
    hooks = keep_outputs(llama, "v_proj", kept)
    assert overwritten(llama, packs[0]) == ["qk", "qk"]
    for hook in hooks:
        hook.remove()
    forward, backward = kept[:2], kept[:1:-1]  # the backward runs the layers again, last first
    assert all(map(torch.equal, forward, backward))
    kept.clear()
    assert overwritten(llama, packs[0]) == ["qkv", "qkv"]


def test_what_another_node_saved_is_not_overwritten(llama, packs):
    """The product saves the values, which reach attention through a view."""

    def double(module, given, out):
        vars(module)["product"] = out * out  # its node holds `out`
        return out

    use_policy(llama, "checkpoint")
    hooks = [layer.self_attn.v_proj.register_forward_hook(double) for layer in llama.model.layers]
    assert overwritten(llama, packs[0]) == ["qk", "qk"]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["view", "storage", "numpy"])
def test_whatever_keeps_the_memory_of_values(kind, llama, packs):
    use_policy(llama, "checkpoint")
    kept = []

    def keep(module, given, out):
        taken = {
            "view": lambda: out.detach()[..., :3],
            "storage": out.untyped_storage,
            "numpy": out.detach().numpy,
        }[kind]
        kept.append(taken())

    hooks = [layer.self_attn.v_proj.register_forward_hook(keep) for layer in llama.model.layers]
    assert overwritten(llama, packs[0]) == ["qk", "qk"]
    for hook in hooks:
        hook.remove()


def test_without_checkpointing_nothing_is_overwritten(llama, packs):
    use_policy(llama, "none")
    assert overwritten(llama, packs[0]) == ["", ""]


def test_graphs_of_gradients_and_anomaly_detection_overwrite_nothing(llama, packs):
    handle = use_policy(llama, "checkpoint")
    weights = list(llama.parameters())
    with torch.autograd.detect_anomaly(check_nan=False):
        assert overwritten(llama, packs[0]) == ["", ""]
    with Backwards() as backwards:
        loss = llama(**packs[0]).loss
        torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    assert backwards.overwritten == ["", ""]
    handle.remove()


def test_a_kept_graph_is_rebuilt_for_every_backward(llama, packs):
    use_policy(llama, "checkpoint")
    expected = step(llama, packs[:1])
    llama.zero_grad()
    torch.manual_seed(3)
    loss = llama(**packs[0]).loss
    with Backwards() as backwards:
        loss.backward(retain_graph=True)
    assert same([p.grad.clone() for p in llama.parameters() if p.grad is not None], expected)
    llama.zero_grad()
    with Backwards() as again:
        loss.backward()
    assert same([p.grad for p in llama.parameters() if p.grad is not None], expected)
    assert backwards.overwritten == again.overwritten == ["qkv", "qkv"]


def test_compiled_autograd_overwrites_nothing(llama, packs, monkeypatch):
    use_policy(llama, "checkpoint")
    expected = step(llama, packs[:1])
    llama.zero_grad()
    torch.manual_seed(3)
    loss = llama(**packs[0]).loss
    seen = []
    original = operators.is_plain_backward

    def is_plain(ctx):
        seen.append(original(ctx))
        return seen[-1]

    monkeypatch.setattr(operators, "is_plain_backward", is_plain)
    with torch._dynamo.compiled_autograd._enable(lambda graph: graph):
        loss.backward()
    torch._dynamo.reset()
    assert seen
    assert not any(seen)
    assert same([p.grad for p in llama.parameters() if p.grad is not None], expected)


WIDE = {"checkpoint": "device/recompute", "attention-kept": "device/device"}


@pytest.mark.parametrize("by_head", [False, True], ids=["all-heads", "by-head"])
@pytest.mark.parametrize("name", WIDE)
def test_the_plan_counts_gradients_in_place(name, by_head, monkeypatch):
    """Attention is wider than the hidden states, so that its backward sets the peak of a layer."""
    monkeypatch.setattr(support, "BACKWARD_LIMITS", ())  # such as float32
    monkeypatch.setattr(support, "may_be_planned", lambda: True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
    )
    model = LlamaForCausalLM(config).train()
    lctrain.patch_model(model, fused=True)
    # A dispatch mode such as the tracker's makes torch add gradients out of place, so few are made.
    model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    tokens = 512
    measured = profile(model, tokens)
    if by_head:
        measured = measured.by_head()
    policies = [LayerPolicy(*WIDE[name].split("/"))] * 3
    planned = [peak + measured.around for peak in layer_peaks(measured.layers, policies)]
    handle = LayerCheckpoints(model, policies, by_head=by_head)
    batch = lctrain.PackedBatch.from_documents([torch.arange(tokens) % 32])
    causal_lm_loss(model, batch)[0].backward()  # makes gradients
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers()])
    with tracker:
        causal_lm_loss(model, batch)[0].backward()
    handle.remove()
    expected = max(planned)
    assert 20 * abs(expected - tracker.peak) <= tracker.peak, (expected, tracker.peak)
    rows = 2 * (8 + 4 + 4) * 32 * tokens  # half of q, k and v, in float32
    assert all(one.beside - one.backward > rows for one in measured.layers)
    assert tracker.peak_beside - tracker.peak > (rows if not by_head else -1)


def compile_some(model, part):
    """Compiles a part of a model, and returns the model, which may be a wrapper."""
    if part == "wrapper":
        return torch.compile(model, backend="eager")
    layer = model.model.layers[0]
    parts = {"model": model, "layer": layer, "attention": layer.self_attn, "mlp": layer.mlp}
    parts[part].compile(backend="eager")
    return model


PLAIN = {"wrapper": 0, "model": 0, "layer": 1, "attention": 1, "mlp": 2}
"""Compiled part -> number of layers, of two, whose attention is not compiled."""


@pytest.mark.parametrize("part", ["model", "layer", "mlp"])
def test_compiled_attention_overwrites_nothing(part, packs, monkeypatch):
    model = make_model("llama").train()
    lctrain.patch_model(model, fused=True, loss=True)
    use_policy(model, "checkpoint")
    model(**packs[0])
    tried = []
    monkeypatch.setattr(operators, "is_unheld", lambda *given: tried.append(given) or False)
    torch._dynamo.reset()
    compile_some(model, part)(**packs[0]).loss.backward()
    torch._dynamo.reset()
    assert len(tried) == 3 * PLAIN[part]


@pytest.mark.parametrize("part", [None, *PLAIN])
def test_a_plan_counts_on_no_gradients_in_place_of_compiled_attention(part, monkeypatch):
    monkeypatch.setattr(support, "BACKWARD_LIMITS", ())  # such as float32
    monkeypatch.setattr(support, "may_be_planned", lambda: True)
    model = wide()
    planned = profile(model if part is None else compile_some(model, part), 512)
    in_place = [layer.beside > layer.backward for layer in planned.layers]
    assert sum(in_place) == PLAIN.get(part, 2)
    assert planned.compiled == (part in ("wrapper", "model"))


def wide():
    """Returns a Llama whose attention is wider than its hidden states."""
    model = make_model("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=32).train()
    lctrain.patch_model(model, fused=True)
    return model


@pytest.mark.parametrize("part", ["wrapper", "model"])
def test_auto_chooses_for_a_compiled_model_what_can_be_traced(part):
    tokens, model, limits = 512, wide(), {"device_gib": 1.006, "host_gib": 1}
    assert "host" in str(plan(model, tokens, "auto", **limits).policies)
    compiled = compile_some(model, part)
    found = plan(compiled, tokens, "auto", **limits)
    assert found.policies == (LayerPolicy(),) * 2
    assert found.fits
    for policy, options in (("offload", {"keep_inputs": 0}), ("checkpoint", {"keep_attention": 1})):
        for refused in (plan, lambda *given, **named: use_policy(*given[::2], tokens=512, **named)):
            with pytest.raises(ValueError, match=r"memory must keep.* under torch\.compile"):
                refused(compiled, tokens, policy, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("here", [False, True], ids=["no-hopper", "hopper"])
def test_the_plan_counts_on_gradients_in_place_of_the_hopper_kernels_only(dtype, here, monkeypatch):
    monkeypatch.setattr(support, "may_be_planned", lambda: here)
    q = torch.empty(64, 2, 64, dtype=dtype, device="meta")
    pack = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 64]), max_seqlen_q=64)
    found = _pytorch_overwrites(Operands(q, q, q), pack, AttentionOptions(softmax_scale=1.0))
    assert bool(found) == (here and dtype == torch.bfloat16)


@pytest.mark.parametrize(("gib", "counted"), [(None, True), (80, True), (48, False)])
def test_no_plan_for_a_small_gpu_counts_on_the_hopper_kernels(gib, counted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with support.planned_memory(None if gib is None else gib * 2**30):
        assert support.may_be_planned() is counted
    assert support.may_be_planned()
