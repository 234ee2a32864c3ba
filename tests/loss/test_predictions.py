"""Tests greedy predictions at chosen positions, with and without a verified head."""

import pytest
import torch

from lctrain import PackedBatch, patch_model
from lctrain.data.passkey import Passkey
from lctrain.eval.answered import answered
from lctrain.loss import predictions
from lctrain.loss.predictions import NO_TOKEN, greedy_tokens


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_without_a_distribution_give_no_token(make_llama, value):
    """Token 0 would be the largest: an answer that begins with it would be right."""
    model = make_llama()
    ids = torch.arange(12).reshape(2, 6) * 5

    def spoil(module, arguments, logits):
        logits[1] = value
        return logits

    model.lm_head.register_forward_hook(spoil)
    places = torch.tensor([0, 7])
    predicted = greedy_tokens(model, {"input_ids": ids, "use_cache": False}, places)
    assert predicted[0] >= 0
    assert predicted[1] == NO_TOKEN
    made = Passkey(ids[1].numpy(), 4, 2, ())
    with pytest.raises(ValueError, match="logits of the model must give a distribution"):
        answered(model, [Passkey(ids[0].numpy(), 4, 2, ()), made], None, torch.device("cpu"))
