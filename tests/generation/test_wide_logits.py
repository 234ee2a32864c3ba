"""Tests that rollouts have logits in the dtype of the trainer's. The head stays as it was."""

import copy

import pytest
import torch
from torch import nn

import lctrain
from lctrain.generation.forward import CachedForward
from lctrain.generation.wide_logits import wide_logits
from tests.numerics import assert_error_at_most_twice

PROMPTS = [[5, 6, 7], [8, 9]]


@pytest.fixture
def half(endless):
    model = endless().to(torch.bfloat16)
    lctrain.patch_model(model)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_products_in_float32(endless, dtype, bias):
    model = endless()
    model.lm_head = nn.Linear(model.config.hidden_size, 97, bias=bias)
    model.to(dtype)
    seen = []
    model.model.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with wide_logits(model):
            logits = model(ids).logits
        assert logits.dtype == torch.float32
        head = copy.deepcopy(model.lm_head)
        plain = head.float()(seen[0].float())
        assert_error_at_most_twice(logits, plain, head.double()(seen[0].double()))
        assert model(ids).logits.dtype == dtype


def test_tokens_are_chosen_from_float32_logits(half, monkeypatch):
    seen = []
    forward = CachedForward.__call__

    def watched(*arguments):
        seen.append(forward(*arguments))
        return seen[-1]

    monkeypatch.setattr(CachedForward, "__call__", watched)
    lctrain.generate(half, PROMPTS, max_new_tokens=3, batching="continuous")
    assert len(seen) == 4  # the first one measures the cache
    for logits in seen[1:]:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_an_error_leaves_the_head_as_it_was(half):
    half.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lctrain.generate(half, PROMPTS, max_new_tokens=3, batching="continuous")
    assert "forward" not in vars(half.lm_head)


def test_two_threads_may_end_in_any_order(half):
    with wide_logits(half):
        del half.lm_head.forward
    assert "forward" not in vars(half.lm_head)


def test_logits_have_half_precision_where_the_trainers_have(half, monkeypatch):
    monkeypatch.setattr("lctrain_kernels.fused_backend.fused_backend", lambda *_: "triton")
    with wide_logits(half):
        assert "forward" not in vars(half.lm_head)


def test_a_head_that_is_more_than_a_product_is_left_alone(half):
    with torch.autocast("cpu", torch.bfloat16), wide_logits(half):
        assert "forward" not in vars(half.lm_head)
    handle = half.lm_head.register_forward_hook(lambda *_: None)
    with wide_logits(half):
        assert "forward" not in vars(half.lm_head)
    handle.remove()
    half.lm_head.forward = own = half.lm_head.forward
    with wide_logits(half):
        assert half.lm_head.forward is own
    assert vars(half.lm_head)["forward"] is own
    with wide_logits(nn.Linear(2, 2)):
        pass
