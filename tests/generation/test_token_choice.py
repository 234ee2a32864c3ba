"""Tests the choice of a token: how often it passes over the logits, which stay as they are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lctrain.generation.noise import add_gumbel, draw_keys, token_numbers
from lctrain.generation.nucleus import keep_top_p
from lctrain.generation.options import SamplingOptions
from lctrain.generation.token_choice import TokenChoice
from lctrain_kernels.sampling import api
from lctrain_kernels.sampling.api import draw
from tests.numerics import assert_error_at_most_twice

ROWS, VOCABULARY = 3, 50
HASH = ["mul_", "__rshift__", "bitwise_xor_", "mul_", "bitwise_and_", "_to_copy"]
NOISE = [*HASH, "add_", "mul_", "log1p_", "neg_", "log_", "sub"]


class Passes(TorchDispatchMode):
    """Counts operations that read or write a tensor of one number per row and token."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.numel() == ROWS * VOCABULARY for x in args):
            self.names.append(func.overloadpacket.__name__)
        return found


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"temperature": 0}, []),
        ({"temperature": 1.0}, NOISE),
        ({"temperature": 0.7}, ["div", *NOISE]),
    ],
    ids=["greedy", "temperature 1", "temperature 0.7"],
)
def test_passes_over_the_logits(options, passes):
    """Nothing is sorted, and logits are divided once, if at all."""
    choice = TokenChoice(SamplingOptions(**options))
    scores = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    keys = choice.keys(range(ROWS), [4] * ROWS)
    with Passes() as seen:
        tokens, log_probs = choice(None, scores, keys)
    assert sorted(seen.names) == sorted([*passes, "_log_softmax", "argmax", "gather"])
    assert torch.equal(scores, before)
    expected = (before / (options["temperature"] or 1.0)).log_softmax(-1)
    assert torch.equal(log_probs, expected.gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize(
    ("options", "by_kernel"),
    [
        ({}, True),
        ({"temperature": 0.7, "top_p": 0.8}, True),
        ({"top_k": 3}, False),
        ({"min_p": 0.1}, False),
        ({"repetition_penalty": 1.2}, False),
    ],
    ids=str,
)
def test_one_kernel_draws_the_same_tokens(options, by_kernel, monkeypatch):
    """On a CPU the kernel is interpreted, and only this test chooses it."""
    scores = 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(5))
    history = torch.arange(ROWS)[:, None]
    found, drawn = [], []
    for serves in (False, True):
        monkeypatch.setattr(api, "draws_on", lambda logits, serves=serves: serves)
        choice = TokenChoice(SamplingOptions(**options))
        with monkeypatch.context() as patch:
            patch.setattr(api, "draw", lambda *given: drawn.append(1) or draw(*given))
            found.append(choice(history, scores, choice.keys(range(ROWS), [4] * ROWS)))
    assert len(drawn) == by_kernel
    (tokens, plain), (by_one, log_probs) = found
    assert torch.equal(tokens, by_one)
    tempered = scores.double() / options.get("temperature", 1.0)
    exact = tempered.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert_error_at_most_twice(log_probs, plain, exact)


def test_a_nucleus_is_that_of_a_sort():
    scores = 3 * torch.randn(40, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        share, order = scores.double().softmax(-1).sort(descending=True)
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept.scatter_(1, order, share.cumsum(-1) - share < top_p)
        with Passes() as seen:
            found = keep_top_p(scores, top_p)
        assert torch.equal(found, scores.masked_fill(~kept, float("-inf")))
        assert not {"sort", "cumsum"} & set(seen.names)


def test_a_nucleus_keeps_all_tokens_of_its_lowest_probability():
    """So it does not depend on the order in which a sort leaves equal numbers."""
    scores = torch.tensor([[0.25, 0.5, 0.125, 0.125], [0.25] * 4]).log()
    assert keep_top_p(scores, 0.8).isfinite().tolist() == [[True] * 4, [True] * 4]
    assert keep_top_p(scores, 0.75).isfinite().tolist() == [[True, True, False, False], [True] * 4]
    assert keep_top_p(scores, 1 - 2**-24).isfinite().all()
    impossible = torch.tensor([[float("-inf"), 1.0, 1.0]])
    assert keep_top_p(impossible, 0.9).isneginf().tolist() == [[True, False, False]]
    assert keep_top_p(impossible * float("nan"), 0.9).isnan().all()


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_softmax_over_seeds_and_over_positions(varied):
    rows = 4000
    scores = torch.randn(8, generator=torch.Generator().manual_seed(2))
    choice = TokenChoice(SamplingOptions())
    numbers = [range(rows), [7] * rows]
    keys = choice.keys(*(numbers if varied == "seed" else numbers[::-1]))
    tokens, _ = choice(None, scores.expand(rows, -1), keys)
    share = scores.double().softmax(-1)
    apart = torch.bincount(tokens, minlength=8) / rows - share
    assert (apart.abs() <= 4 * (share * (1 - share) / rows).sqrt()).all()
    pairs = torch.bincount(tokens[:-1] * 8 + tokens[1:], minlength=64) / (rows - 1)
    expected = torch.outer(share, share).flatten()
    apart = pairs - expected
    assert (apart.abs() <= 4 * (expected * (1 - expected) / (rows - 1)).sqrt()).all()


def test_a_draw_depends_on_seed_and_position_alone():
    seeds, positions = [3, -1, 2**64 - 1, 3, 0], [5, 5, 5, 6, 9]
    keys = draw_keys(seeds, positions)
    assert torch.equal(keys[1], keys[2])  # the same 64 bits
    assert len(keys.unique(dim=0)) == 4
    for row, pair in enumerate(zip(seeds, positions, strict=True)):
        assert torch.equal(draw_keys(*([value] for value in pair))[0], keys[row])
    scores = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))
    numbers = token_numbers(VOCABULARY, scores.device)
    noise = add_gumbel(scores, keys, numbers)
    for row in range(5):
        assert torch.equal(add_gumbel(scores[row, None], keys[row, None], numbers)[0], noise[row])
