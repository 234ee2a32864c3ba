"""Tests fused layers from inside: which products run, what hooks see, and second derivatives."""

import pytest
import torch

import lctrain
from lctrain.batch import PackedBatch
from tests.models.families import make_documents, packed_outputs
from tests.models.test_fused import make
from tests.numerics import assert_equal_sums


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products, and additions of tensors as large as the hidden states."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.counts = {"mm": 0, "addmm": 0, "add": 0}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::").rstrip("_")
        if name in self.counts and (name != "add" or args[0].numel() == self.elements):
            self.counts[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_gradients_and_residuals_are_added_inside_the_products(family) -> None:
    """Projections of one input share its gradient, and the MLP's product adds the residual."""
    model, documents = make(family).train(), make_documents()
    batch = PackedBatch.from_documents(documents)
    elements = batch.input_ids.numel() * model.config.hidden_size
    counts = []
    for fused in (True, False):
        with lctrain.patch_model(model, fused=fused), Products(elements) as seen:
            model(**batch.model_kwargs()).logits.sum().backward()
        counts.append(seen.counts)
    layers = model.config.num_hidden_layers
    assert counts[0]["add"] == 0
    assert counts[1]["add"] >= 6 * layers
    assert counts[0]["addmm"] == 3 * layers  # k, v and up
    inside = 3 * layers  # products of the down projection, which are part of gated_linear
    assert counts[0]["mm"] + counts[0]["addmm"] + inside == counts[1]["mm"]


PARTS = (
    "mlp",
    "mlp.gate_proj",
    "mlp.act_fn",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.q_norm",
)


@pytest.mark.parametrize("name", PARTS)
def test_hooks_see_what_they_would_see_without_fusion(name) -> None:
    model, documents = make("qwen3"), make_documents()
    seen = []
    for layer in model.model.layers:
        layer.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].detach(), output.detach()))
        )
    for fused in (True, False):
        with lctrain.patch_model(model, fused=fused):
            packed_outputs(model, documents)
    half = len(seen) // 2
    assert half >= 1
    for fused_pair, own_pair in zip(seen[:half], seen[half:], strict=True):
        for actual, expected in zip(fused_pair, own_pair, strict=True):
            assert_equal_sums(actual, expected)


@pytest.mark.parametrize("name", PARTS)
def test_what_a_hook_keeps_is_not_overwritten_without_gradients(name) -> None:
    model = make("qwen3").eval()
    kept = []
    for layer in model.model.layers:
        layer.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: kept.extend((x, x.clone()) for x in (*inputs, output))
        )
    with lctrain.patch_model(model, fused=True), torch.no_grad():
        packed_outputs(model, make_documents())
    assert len(kept) >= 2 * len(model.model.layers)
    assert all(torch.equal(now, before) for now, before in kept)


@pytest.mark.parametrize("name", PARTS)
def test_backward_hooks_see_what_they_would_see_without_fusion(name) -> None:
    documents = make_documents()
    seen = []
    for fused in (True, False):
        model = make("qwen3")
        gradients_of: list[torch.Tensor] = []
        model.model.layers[1].get_submodule(name).register_full_backward_hook(
            lambda module, inputs, outputs, to=gradients_of: to.extend((inputs[0], outputs[0]))
        )
        with lctrain.patch_model(model, fused=fused):
            packed_outputs(model, documents).sum().backward()
        seen.append(gradients_of)
    assert len(seen[0]) == 2
    for actual, expected in zip(*seen, strict=True):
        assert_equal_sums(actual, expected)


def test_projections_may_share_a_weight() -> None:
    model, documents = make("llama"), make_documents()
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    results = []
    for fused in (True, False):
        with lctrain.patch_model(model, fused=fused):
            results.append(packed_outputs(model, documents))
    assert_equal_sums(*results)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_a_second_derivative_is_an_error(family) -> None:
    """Not a gradient that lacks what the fused operations contribute."""
    model, documents = make(family), make_documents()
    with lctrain.patch_model(model, fused=True):
        out = packed_outputs(model, documents)
    weight = model.get_input_embeddings().weight
    (first,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.square().sum(), list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_without_gradients_the_product_overwrites_the_residual(family) -> None:
    """torch.addmm would copy the residual stream, which nothing reads afterwards."""
    model = make(family).eval()
    batch = PackedBatch.from_documents(make_documents())
    written = []

    class Written(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator is torch.ops.aten.addmm.out:
                written.append(kwargs["out"] is args[0])
            return operator(*args, **(kwargs or {}))

    with lctrain.patch_model(model, fused=True):
        expected = model(**batch.model_kwargs(), output_hidden_states=True).hidden_states
        with torch.no_grad(), Written():
            found = model(**batch.model_kwargs(), output_hidden_states=True).hidden_states
    assert written == [True] * model.config.num_hidden_layers
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
