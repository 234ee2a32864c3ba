"""Tests the choice of a token: how often it passes over the logits, which stay as they are."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lctrain.generation.options import SamplingOptions
from lctrain.generation.token_choice import TokenChoice

ROWS, VOCABULARY = 3, 50


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
        ({"temperature": 1.0}, ["log_", "sub"]),
        ({"temperature": 0.7}, ["div", "log_", "sub"]),
    ],
    ids=["greedy", "temperature 1", "temperature 0.7"],
)
def test_passes_over_the_logits(options, passes):
    """Nothing is sorted, and logits are divided once, if at all."""
    choice = TokenChoice(SamplingOptions(**options))
    scores = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    generators = [choice.generator(seed, scores.device) for seed in range(ROWS)]
    with Passes() as seen:
        tokens, log_probs = choice(None, scores, generators)
    views = {"unbind", "select", "empty_like"}
    every = [name for name in seen.names if name not in views]
    assert sorted(every) == sorted([*passes, "_log_softmax", "argmax", "gather"])
    assert torch.equal(scores, before)
    expected = (before / (options["temperature"] or 1.0)).log_softmax(-1)
    assert torch.equal(log_probs, expected.gather(1, tokens[:, None])[:, 0])
