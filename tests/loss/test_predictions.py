"""Tests greedy predictions at chosen positions, with and without a verified head."""

import pytest
import torch

from lctrain import PackedBatch, patch_model
from lctrain.loss import predictions
from lctrain.loss.predictions import greedy_tokens


@pytest.mark.parametrize("head", ["verified", "unknown"])
@pytest.mark.parametrize("layout", ["pack", "rows"])
def test_predictions_are_those_of_the_logits(make_llama, monkeypatch, head, layout):
    model = make_llama()
    if head == "unknown":
        monkeypatch.setattr(predictions, "find_output_head", lambda *args: None)
    ids = torch.arange(12).reshape(2, 6) * 5
    expected = model(input_ids=ids).logits.argmax(-1).flatten()
    places = torch.tensor([0, 3, 7, 11])
    if layout == "pack":
        patch_model(model)
        kwargs = PackedBatch.from_documents(list(ids)).model_kwargs()
    else:
        kwargs = {"input_ids": ids, "use_cache": False}
    predicted = greedy_tokens(model, kwargs, places)
    assert predicted.tolist() == expected[places].tolist()
    assert not predicted.requires_grad
