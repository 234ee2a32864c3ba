"""Tests the masking of packs: shares, seeds, special tokens, loaders and bad values."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.config import DataSettings
from lctrain.data import MaskedPackCollator, MaskTokens
from lctrain.distributed import Topology

MASK, SPECIAL, VOCABULARY = 3, frozenset({0, 1, 2, 3}), 200
MASKING = MaskTokens(MASK, VOCABULARY, SPECIAL, fraction=0.3, seed=5)


def pack(tokens=20_000, seed=0):
    generator = np.random.default_rng(seed)
    lengths = (tokens // 4, tokens - tokens // 4)
    return PackedBatch.from_documents([generator.integers(0, VOCABULARY, n) for n in lengths])


def test_shares_and_labels():
    batch = pack()
    masked = MASKING(batch)
    chosen = masked.labels != IGNORE_INDEX
    old, new = batch.input_ids[chosen], masked.input_ids[chosen]
    assert torch.equal(masked.labels[chosen], old)
    assert torch.equal(masked.input_ids[~chosen], batch.input_ids[~chosen])
    assert masked.num_valid_tokens == int(chosen.sum())
    ordinary = int((~torch.isin(batch.input_ids, torch.tensor(sorted(SPECIAL)))).sum())
    n = len(old)
    for share, expected, of in (
        (n, 0.3, ordinary),
        (int((new == MASK).sum()), 0.8, n),
        (int((new == old).sum()), 0.1, n),
    ):
        deviation = (expected * (1 - expected) * of) ** 0.5
        assert abs(share - expected * of) < 5 * deviation
    assert not set(old.tolist()) & SPECIAL
    assert not set(new[new != MASK].tolist()) & SPECIAL
    assert batch.labels.shape == masked.labels.shape


def test_the_choice_depends_on_seed_epoch_and_tokens_alone():
    batch = pack(500)
    same = MASKING(pack(500))
    assert torch.equal(MASKING(batch).input_ids, same.input_ids)
    assert torch.equal(MASKING(batch).labels, same.labels)
    others = [
        MASKING(batch, epoch=1),
        MaskTokens(MASK, VOCABULARY, SPECIAL, 0.3, seed=6)(batch),
        MASKING(pack(500, seed=1)),
    ]
    assert not any(torch.equal(other.labels, same.labels) for other in others)


def test_the_collator_masks_packs_and_serves_transformers():
    documents = [{"input_ids": list(range(10, 60))}, {"input_ids": list(range(60, 90))}]
    collate = MaskedPackCollator(masking=MASKING)
    batch = collate(documents)
    assert batch.lengths == (50, 30)
    assert (batch.input_ids == MASK).any()
    arguments = MaskedPackCollator(masking=MASKING, as_arguments=True)(documents)
    assert torch.equal(arguments["labels"], batch.labels)
    assert torch.equal(arguments["input_ids"], batch.input_ids)
    assert "schedule" not in arguments
    later = MaskedPackCollator(masking=MASKING, epoch=1)(documents)
    assert not torch.equal(later.labels, batch.labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fraction": 0.0}, r"fraction must be in \(0, 1\), got 0.0. BERT masks"),
        ({"fraction": 1.0}, r"fraction must be in \(0, 1\), got 1.0. BERT masks"),
        ({"seed": -1}, "seed must be"),
        ({"mask_token_id": VOCABULARY}, r"mask_token_id must be in \[0, vocab_size = 200\), got"),
        ({"vocab_size": 4}, "vocab_size must leave a token that is not special, got 4"),
    ],
)
def test_bad_values(values, message):
    given = {"mask_token_id": MASK, "vocab_size": VOCABULARY, "special_ids": SPECIAL} | values
    with pytest.raises(ValueError, match=message):
        MaskTokens(**given)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"mask_fraction must be in \(0, 1\), got 2"):
        DataSettings(mask_fraction=2)
    with pytest.raises(ValueError, match="passkey_fraction must be 0 with masked tokens"):
        DataSettings(mask_fraction=0.2, passkey_fraction=0.1)


def test_a_data_module_masks_all_its_batches_and_resumes(make_data):
    data = make_data(max_tokens=64, mask_fraction=0.3, vocab_size=300)
    data.setup()
    assert data.tokenizer.mask_token_id == 299
    assert data.vocab_size == 300
    loader = data.train_dataloader()
    epoch = list(loader)
    following = next(iter(loader))
    assert all((batch.labels == IGNORE_INDEX).any() for batch in epoch)
    assert any((batch.input_ids == 299).any() for batch in epoch)
    again = make_data(max_tokens=64, mask_fraction=0.3, vocab_size=300)
    again.setup()
    again.load_state_dict(data.state_dict() | {"batches": len(epoch)})
    assert torch.equal(next(iter(again.train_dataloader())).input_ids, following.input_ids)
    held_out = [batch.input_ids for batch in data.val_dataloader()]
    repeated = [batch.input_ids for batch in again.val_dataloader()]
    assert all(torch.equal(a, b) for a, b in zip(held_out, repeated, strict=True))
    assert data.settings["mask_fraction"] == 0.3


def test_masked_packs_that_ranks_share_are_refused(make_data):
    """Every rank would choose other tokens of the pack."""
    data = make_data(max_tokens=64, mask_fraction=0.3, vocab_size=300)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(topology=Topology(0, 2, context=2)))
    message = r"context_parallel must be 1 with mask_fraction=0.3, got 2: .*Leave it out"
    for call in (data.prepare_data, data.setup):
        with pytest.raises(ValueError, match=message):
            call()


def test_tokenizers_need_a_mask_token(make_data):
    plain = make_data(max_tokens=64, vocab_size=300)
    plain.setup()
    with pytest.raises(ValueError, match="tokenizer must have a mask token for masked language"):
        MaskTokens.of(plain.tokenizer)
    small = make_data(max_tokens=64, mask_fraction=0.3, vocab_size=257)
    with pytest.raises(ValueError, match="vocab_size must be at least 258, got 257"):
        small.setup()
