"""Tests draws from the softmax of logits against noise and nucleus in plain PyTorch."""

import pytest
import torch

from lctrain.generation.noise import add_gumbel, draw_keys, token_numbers
from lctrain.generation.nucleus import keep_top_p
from lctrain_kernels.sampling.api import draw, draws_on
from tests.numerics import assert_error_at_most_twice

NAN, INF = float("nan"), float("inf")
kernels = pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cpu", torch.float32, id="float32"),
        pytest.param("cpu", torch.float16, id="float16"),
        pytest.param("cuda", torch.float32, id="gpu-float32", marks=pytest.mark.gpu),
        pytest.param("cuda", torch.bfloat16, id="gpu-bfloat16", marks=pytest.mark.gpu),
    ],
)


def noise(rows: int, words: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the keys of rows and the numbers of words."""
    keys = draw_keys(range(rows), [7 * row for row in range(rows)])
    return keys.to(device), token_numbers(words, torch.device(device))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3)])
@kernels
def test_the_draws_of_plain_pytorch(device, dtype, temperature, top_p):
    rows, words = 12, 5003
    logits = (3 * torch.randn(rows, words, device=device)).to(dtype)
    keys, numbers = noise(rows, words, device)
    tokens, log_probs = draw(logits, keys, numbers, temperature, top_p)
    tempered = logits.float() / temperature
    kept = tempered if top_p == 1 else keep_top_p(tempered, top_p)
    expected = add_gumbel(kept, keys, numbers).argmax(-1)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, logits.float().argmax(-1))
    plain, exact = (
        torch.log_softmax(logits.to(kind) / temperature, -1).gather(-1, tokens[:, None])[:, 0]
        for kind in (torch.float32, torch.float64)
    )
    assert (tokens.dtype, log_probs.dtype) == (torch.int64, torch.float32)
    assert_error_at_most_twice(log_probs, plain, exact)


@kernels
def test_a_small_nucleus_holds_the_most_probable_token(device, dtype):
    logits = torch.rand(8, 256, device=device).argsort(-1).to(dtype)  # no two are equal
    tokens, _ = draw(logits, *noise(8, 256, device), 1.0, 1e-6)
    assert torch.equal(tokens, logits.float().argmax(-1))


@kernels
def test_a_nucleus_keeps_all_tokens_of_its_lowest_probability(device, dtype):
    share = torch.tensor([[0.25, 0.5, 0.125, 0.125]], device=device).expand(64, 4)
    drawn = []
    for top_p in (0.7, 0.8):
        tokens, _ = draw(share.log().to(dtype), *noise(64, 4, device), 1.0, top_p)
        drawn.append(set(tokens.tolist()))
    assert drawn == [{0, 1}, {0, 1, 2, 3}]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@kernels
def test_rows_without_a_distribution_give_nan(device, dtype, top_p):
    logits = torch.zeros(6, 5000, device=device, dtype=dtype)
    logits[0, 4321] = NAN
    logits[1, 17] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, 1:] = -INF
    tokens, log_probs = draw(logits, *noise(6, 5000, device), 0.5, top_p)
    assert log_probs.isnan().tolist() == [True] * 4 + [False] * 2
    assert (tokens[4].item(), log_probs[4].item()) == (0, 0.0)
    assert set(tokens.tolist()) <= set(range(5000))


@kernels
def test_a_row_draws_the_same_in_every_batch(device, dtype):
    logits = torch.randn(6, 600, device=device).to(dtype)
    keys, numbers = noise(6, 600, device)
    together = draw(logits, keys, numbers, 0.9, 0.95)
    for row in range(6):
        alone = draw(logits[row : row + 1], keys[row : row + 1], numbers, 0.9, 0.95)
        assert all(
            torch.equal(one[row : row + 1], x) for one, x in zip(together, alone, strict=True)
        )


@kernels
def test_operands_that_are_not_contiguous(device, dtype):
    logits, (keys, numbers) = torch.randn(5, 700, device=device).to(dtype), noise(5, 700, device)
    expected = draw(logits, keys, numbers, 0.8, 0.9)
    for change in (lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]], wide, turned):
        found = draw(change(logits), change(keys), change(numbers), 0.8, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Returns the numbers of a tensor with others between them."""
    return torch.stack((x, x + 1), -1)[..., 0]


def turned(x: torch.Tensor) -> torch.Tensor:
    """Returns a matrix whose columns are contiguous; a vector as it is."""
    return x.t().contiguous().t()


def test_calls_that_no_kernel_serves():
    assert not draws_on(torch.zeros(1, 4))  # a CPU draws with plain PyTorch
    with pytest.raises(ValueError, match=r"does not serve torch\.float64"):
        draw(torch.zeros(1, 4, dtype=torch.float64), *noise(1, 4, "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits must be floating point \[B, V\]"),
        ({"keys": torch.zeros(2, 3, dtype=torch.int32)}, r"keys must be int32 of shape \(1, 3\)"),
        ({"numbers": torch.zeros(4)}, r"numbers must be int32 of shape \(4,\)"),
        ({"temperature": 0.0}, "temperature and top_p must be above 0"),
        ({"top_p": 1.5}, "and top_p at most 1, got 1.0 and 1.5"),
    ],
)
def test_wrong_arguments(change, message):
    keys, numbers = noise(1, 4, "cpu")
    arguments = {"logits": torch.zeros(1, 4), "keys": keys, "numbers": numbers, **change}
    with pytest.raises(ValueError, match=message):
        draw(**arguments)
