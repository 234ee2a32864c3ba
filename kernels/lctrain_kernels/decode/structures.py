"""Named tuples of a decode call: the cache, the new tokens, the options, the plan."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KVCache(NamedTuple):
    """Keys and values of B requests, dense or paged.

    Attributes:
        k: Keys [rows, S, Hk, D] of a dense cache, or [pages, page, Hk, D] of a paged one.
        v: Values, in the shape of k.
        seqlens: Number of tokens of each request that the cache holds, [B] int32; padding on the
            left counts.
        batch_index: Row of a dense cache that holds a request, [B] int32; None for row b.
        leftpad: Tokens of padding before a request's first key, [B] int32; None for none.
        block_table: Page numbers of each request, [B, pages per request] int32; None if dense.
    """

    k: Tensor
    v: Tensor
    seqlens: Tensor
    batch_index: Tensor | None = None
    leftpad: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def page(self) -> int:
        """Tokens of a page; 0 for a dense cache."""
        return 0 if self.block_table is None else self.k.shape[1]

    @property
    def capacity(self) -> int:
        """Most tokens of a request."""
        if self.block_table is None:
            return self.k.shape[1]
        return self.block_table.shape[1] * self.k.shape[1]


class NewTokens(NamedTuple):
    """Tokens that a call appends to the cache, and the tables of their rotation.

    Attributes:
        k: New keys [B, S_new, Hk, D], not rotated; None if nothing is appended.
        v: New values [B, S_new, Hk, D]; None if nothing is appended.
        cos: Cosines [positions, R / 2], in the dtype of q; None without a rotation.
        sin: Sines, in the shape of cos.
        interleaved: Whether columns 2i and 2i + 1 are a pair, instead of i and i + R / 2.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = True

    @property
    def tokens(self) -> int:
        """Number of new tokens of each request."""
        return 0 if self.k is None else self.k.shape[1]

    @property
    def rotary(self) -> int:
        """Number of rotated columns R; 0 without a rotation."""
        return 0 if self.cos is None else 2 * self.cos.shape[1]


class DecodeOptions(NamedTuple):
    """Options of the attention of a decode call.

    Attributes:
        softmax_scale: Positive factor of q.k.
        window_left: Number of visible keys before a query's own position; -1 is unbounded.
        window_right: Number of visible keys after a query's own position; -1 is unbounded, 0 is a
            causal mask.
        softcap: A softcap c > 0 replaces a logit x by c tanh(x / c); 0 turns it off.
        alibi_slopes: ALiBi slopes, [H] or [B, H] float32, or None.
        learnable_sink: Logit of the attention sink of each head, [H], or None.
        split: "fixed" or "exact".
        num_splits: 0 for splits of a fixed size; 1 for none; n for the capacity over n.
        wide: Whether out is float32, for a caller that adds results.
        halves: Whether each half of the key heads is paired with both halves of the value heads,
            as version 1 of differential attention needs. q then has twice the query heads, in the
            order of `triton_attend.heads_of_tile`.
    """

    softmax_scale: float
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    learnable_sink: Tensor | None = None
    split: str = "fixed"
    num_splits: int = 0
    wide: bool = False
    halves: bool = False

    @property
    def rotates_each(self) -> bool:
        """Whether query i is rotated by i more positions than query 0; else all alike."""
        return self.window_left >= 0 or self.window_right >= 0


class PackedQueries(NamedTuple):
    """Numbers of queries of the requests, if queries [T, H, D] are packed.

    Attributes:
        cu_seqlens: Cumulative numbers of queries, [B + 1] int32.
        longest: Largest number of queries of a request.
    """

    cu_seqlens: Tensor
    longest: int

    @property
    def requests(self) -> int:
        """Number of requests B."""
        return self.cu_seqlens.shape[0] - 1


class SharedPrefixes(NamedTuple):
    """Groups of requests that begin with the same pages, for make_decode_plan.

    The tensors are on the device of the cache. A CUDA graph that was captured with them reads their
    values at every replay: `longest` and `most` must be bounds of all of them, and a group that a
    replay does not have has no members.

    Attributes:
        prefix: Tokens that a request shares with its group, [B] int32; 0 for a request without one.
        members: Requests of all groups, group by group, [M] int32.
        groups: Index of the first member, number of members and tokens of the prefix of each group,
            [G, 3] int32.
        longest: Tokens of the longest prefix.
        most: Number of members of the largest group.
    """

    prefix: Tensor
    members: Tensor
    groups: Tensor
    longest: int
    most: int


class DecodePlan(NamedTuple):
    """Splits of all requests of a step, without those that no query sees.

    Attributes:
        work: Number of splits, then request * max_splits + slot of each, [1 + B * max_splits]
            int32, on the device of the cache. Splits of shared prefixes are not listed.
        max_splits: Splits of a request, at most.
        split_size: Keys of a split.
        seqlen_q: Queries of a request.
        new_tokens: Tokens that a call appends to each request.
        window_left: Visible keys before a query's own position; -1 is unbounded.
        has_leftpad: Whether requests have padding on the left.
        shared: Prefixes that several requests share; None for none.
        seqlens: Copy of the cache_seqlens of the plan, [B] int32, by which a call finds a plan of
            another step. None where the checks read no values.
        leftpad: Copy of the cache_leftpad of the plan, [B] int32; None as seqlens, or for none.
    """

    work: Tensor
    max_splits: int
    split_size: int
    seqlen_q: int
    new_tokens: int
    window_left: int
    has_leftpad: bool = False
    shared: SharedPrefixes | None = None
    seqlens: Tensor | None = None
    leftpad: Tensor | None = None
