"""Tests the perplexity of masked tokens by context length."""

import dataclasses

import numpy as np
import pytest
import torch

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.data import MaskTokens, TokenizedDocument
from lctrain.eval import masked_perplexity_by_length
from lctrain.models import patch_model
from tests.loss.test_masked_lm import masked_lm
from tests.models.families import VOCABULARY
from tests.numerics import assert_equal_in_float64

MASKING = MaskTokens(3, VOCABULARY, frozenset({0, 1, 2, 3}), fraction=0.3)


def documents(lengths=(23, 9, 14)):
    generator = np.random.default_rng(0)
    tokens = [generator.integers(4, VOCABULARY, length) for length in lengths]
    return [TokenizedDocument(str(i), ids, i) for i, ids in enumerate(tokens)]


@pytest.mark.usefixtures("in_float64")
def test_losses_are_those_of_single_windows_patched_or_not():
    model = masked_lm("modernbert").train()
    sums = {8: 0.0, 32: 0.0}
    count = 0
    for document in documents():
        batch = MASKING(PackedBatch.from_documents([document.input_ids]))
        count += batch.num_valid_tokens
        for length in sums:
            pieces = zip(
                batch.input_ids[0].split(length), batch.labels[0].split(length), strict=True
            )
            for tokens, labels in pieces:
                with torch.no_grad():
                    logits = model.eval()(tokens[None]).logits[0]
                sums[length] += torch.nn.functional.cross_entropy(
                    logits, labels, ignore_index=IGNORE_INDEX, reduction="sum"
                ).item()
    model.train()
    plain = masked_perplexity_by_length(model, documents(), [32, 8], MASKING, max_tokens=32)
    assert model.training
    with patch_model(model):
        packed = masked_perplexity_by_length(model, documents(), [8, 32], MASKING, max_tokens=32)
    for table in (plain, packed):
        assert [row.length for row in table.rows] == [8, 32]
        for row in table.rows:
            assert row.tokens == count
            expected = torch.tensor(sums[row.length] / count, dtype=torch.float64)
            assert_equal_in_float64(torch.tensor(row.loss, dtype=torch.float64), expected)
        assert table.rows[0].mean_context < table.rows[1].mean_context
    assert [row.windows for row in packed.rows] == [7, 3]
    assert "8" in str(packed)


def test_bad_arguments():
    model = masked_lm("modernbert")
    never = dataclasses.replace(MASKING, fraction=1e-12)
    with pytest.raises(ValueError, match="documents must hold a masked token, got none in 3"):
        masked_perplexity_by_length(model, documents(), [8], never, max_tokens=8)
    with pytest.raises(ValueError, match="must be at least 2"):
        masked_perplexity_by_length(model, documents(), [1], MASKING, max_tokens=8)
