"""MaskTokens and MaskedPackCollator: choose the tokens that a masked language model predicts."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.data.collator import PackCollator
from lctrain.data.special_tokens import special_ids
from lctrain.instances import require_int
from lctrain.limits import check_seed, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_FRACTION = 0.15
REPLACED = 0.8  # of the chosen tokens; BERT's shares
RANDOM = 0.1


@dataclass(frozen=True)
class MaskTokens:
    """Masks tokens of packs as BERT does: 80 % [MASK], 10 % a random token, 10 % unchanged.

    The choice depends on the seed, the epoch and the tokens of the pack only. So a resumed run
    masks the same tokens, on any number of ranks, and every epoch masks others.

    Attributes:
        mask_token_id: Token that takes the place of most chosen tokens.
        vocab_size: Number of tokens among which a random one is drawn.
        special_ids: Special tokens, which are neither chosen nor drawn.
        fraction: Probability of choosing a token, in (0, 1).
        seed: Seed of the choice.

    Raises:
        ValueError: if a value is out of range.
    """

    mask_token_id: int
    vocab_size: int
    special_ids: frozenset[int] = frozenset()
    fraction: float = DEFAULT_FRACTION
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mask_token_id", "vocab_size"):
            require_int(name, getattr(self, name), 0, "Pass the tokenizer's.")
        check_mask_fraction(self.fraction)
        check_seed(self.seed)
        require(
            0 <= self.mask_token_id < self.vocab_size,
            f"mask_token_id must be in [0, vocab_size = {self.vocab_size}), got "
            f"{self.mask_token_id}. Pass the id of the tokenizer's mask token.",
        )
        require(
            len(self._ordinary()) > 0,
            f"vocab_size must leave a token that is not special, got {self.vocab_size} and "
            f"{len(self.special_ids)} special ones. Check the tokenizer.",
        )

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, fraction: float = DEFAULT_FRACTION, seed: int = 0
    ) -> MaskTokens:
        """Returns the masking for a tokenizer's tokens.

        Args:
            tokenizer: A transformers tokenizer with a mask token.
            fraction: Probability of choosing a token, in (0, 1).
            seed: Seed of the choice.

        Raises:
            ValueError: if the tokenizer has no mask token, or a value is out of range.
        """
        mask = getattr(tokenizer, "mask_token_id", None)
        if mask is None:
            raise ValueError(
                f"tokenizer must have a mask token for masked language modeling, got "
                f"{type(tokenizer).__name__} without one. Set tokenizer.mask_token, save it, and "
                "name that folder."
            )
        special = frozenset(special_ids(tokenizer).values())
        return cls(mask, len(tokenizer), special, fraction, seed)

    def __call__(self, batch: PackedBatch, epoch: int = 0) -> PackedBatch:
        """Returns a pack with masked tokens, on the CPU.

        Args:
            batch: A pack on the CPU.
            epoch: Number of the epoch, part of the key of the choice.

        Returns:
            The pack. Labels are not shifted: they hold the chosen tokens, and -100 elsewhere.
        """
        tokens = batch.input_ids[0].numpy()
        key = zlib.crc32(np.ascontiguousarray(tokens).tobytes())
        generator = np.random.default_rng([self.seed, epoch, key])
        chosen = generator.random(len(tokens)) < self.fraction
        chosen &= ~np.isin(tokens, list(self.special_ids))
        way = generator.random(len(tokens))
        drawn = generator.choice(self._ordinary(), len(tokens))
        masked = np.where(chosen & (way < REPLACED), self.mask_token_id, tokens)
        masked = np.where(chosen & (way >= 1 - RANDOM), drawn, masked)
        labels = np.where(chosen, tokens, IGNORE_INDEX)
        return dataclasses.replace(
            batch,
            input_ids=torch.from_numpy(masked)[None],
            labels=torch.from_numpy(labels)[None],
            num_valid_tokens=int(chosen.sum()),
        )

    def _ordinary(self) -> np.ndarray:
        """Returns the ids of tokens that are not special, in rising order."""
        return np.setdiff1d(np.arange(self.vocab_size), list(self.special_ids))


def check_mask_fraction(fraction: float, prefix: str = "") -> None:
    """Raises a ValueError unless a share of masked tokens is in (0, 1).

    Args:
        fraction: The share.
        prefix: Text before the name in the message.
    """
    require(
        0 < fraction < 1,
        f"{prefix}fraction must be in (0, 1), got {fraction}. BERT masks 0.15 of the tokens.",
    )


@dataclass(frozen=True, kw_only=True)
class MaskedPackCollator(PackCollator):
    """A PackCollator that masks tokens of every pack; a `collate_fn` for any DataLoader.

    Attributes:
        masking: The choice of tokens: see `MaskTokens.of`.
        epoch: Number of the epoch. Equal packs get equal masks within an epoch.
    """

    masking: MaskTokens = field()
    epoch: int = 0

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> PackedBatch | dict[str, Any]:
        """Packs documents and masks tokens, and returns them in the form that `as_arguments` sets.

        With `as_arguments`, the labels are those of transformers' masked language models.
        """
        batch = self.masking(self.pack(documents), self.epoch)
        if not self.as_arguments:
            return batch
        arguments = batch.model_kwargs()
        del arguments["schedule"], arguments["use_cache"]
        return {"labels": batch.labels, **arguments}
