"""Workloads of the benchmarks: document lengths, head counts, head dim, and FLOPs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Workload:
    """Sizes of a pack of documents, to which causal attention is applied.

    Attributes:
        name: Name of the workload on the command line, in `--workloads`.
        lengths: Number of tokens of each document.
        heads: Number of query heads.
        heads_kv: Number of key/value heads.
        head_dim: Head dim of queries, keys and values.
        dropout_p: Probability of dropping an attention weight.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int
    heads_kv: int
    head_dim: int
    dropout_p: float = 0.0

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of the pack."""
        return sum(self.lengths)

    @property
    def forward_flops(self) -> int:
        """Returns the FLOPs of a forward: 2 L^2 H D per document of L tokens.

        That is the causal half of two products, for H heads of head dim D.
        """
        return sum(2 * length**2 for length in self.lengths) * self.heads * self.head_dim

    @property
    def backward_flops(self) -> float:
        """Returns the FLOPs of a backward: five products, 2.5 times the forward's two."""
        return 2.5 * self.forward_flops

    def describe(self) -> str:
        """Describes the workload in one line for the terminal."""
        count = len(self.lengths)
        documents = f"{count} document{'s' if count > 1 else ''}"
        dropout = f", dropout {self.dropout_p}" if self.dropout_p else ""
        return (
            f"{documents}, {self.tokens:,} tokens, longest {max(self.lengths):,}, "
            f"{self.heads}/{self.heads_kv} heads of {self.head_dim}{dropout}"
        )


def lognormal_lengths(
    tokens: int, *, mu: float = 6.5, sigma: float = 1.0, shortest: int = 16, seed: int = 0
) -> tuple[int, ...]:
    """Draws document lengths until `tokens` are filled; the last document is cut to fit.

    Args:
        tokens: Sum of the lengths.
        mu: Mean of the logarithm of a length.
        sigma: Standard deviation of the logarithm of a length.
        shortest: Smallest length; shorter draws are raised to it.
        seed: Seed of a CPU generator, so that every machine times the same pack.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    room = tokens
    while room > 0:
        draw = torch.exp(torch.randn(1, generator=generator) * sigma + mu)
        length = min(int(draw.clamp(min=shortest).item()), room)
        lengths.append(length)
        room -= length
    return tuple(lengths)


_32K = 32 * 1024
_MIX = lognormal_lengths(_32K)
# A heavier tail: one document has 29 % of the tokens; half of the documents have under 230.
_TAIL = lognormal_lengths(_32K, mu=5.5, sigma=1.8)

_ALL = (
    Workload("1x32k", (_32K,), 32, 8, 128),
    Workload("4x8k", (8192,) * 4, 32, 8, 128),
    Workload("16x2k", (2048,) * 16, 32, 8, 128),
    Workload("mix32k", _MIX, 32, 8, 128),
    Workload("mix32k_tail", _TAIL, 32, 8, 128),
    Workload("1x32k_d64", (_32K,), 32, 32, 64),
    Workload("mix32k_d64", _MIX, 32, 32, 64),
    Workload("1x32k_d96", (_32K,), 32, 8, 96),
    Workload("mix32k_d96", _MIX, 32, 8, 96),
    Workload("1x32k_d256", (_32K,), 16, 4, 256),
    Workload("mix32k_d256", _MIX, 16, 4, 256),
    Workload("1x32k_dropout", (_32K,), 32, 8, 128, dropout_p=0.1),
    Workload("4x8k_dropout", (8192,) * 4, 32, 8, 128, dropout_p=0.1),
    Workload("mix32k_dropout", _MIX, 32, 8, 128, dropout_p=0.1),
    Workload("1x128k", (4 * _32K,), 32, 8, 128),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
