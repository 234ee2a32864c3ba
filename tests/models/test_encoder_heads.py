"""Every head of every supported encoder computes the same with and without its padding."""

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from lctrain.models import patch_model
from tests.models.tiny import tiny_model
from tests.numerics import assert_equal_in_float64

FAMILIES = (
    "albert", "bert", "bert-generation", "camembert", "data2vec-text", "distilbert", "electra",
    "ernie", "eurobert", "gte", "jina_embeddings_v3", "modernbert", "nomic_bert", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
)  # fmt: skip
TASKS = (
    "MAPPING", "FOR_PRETRAINING_MAPPING", "FOR_MASKED_LM_MAPPING", "FOR_CAUSAL_LM_MAPPING",
    "FOR_SEQUENCE_CLASSIFICATION_MAPPING", "FOR_TOKEN_CLASSIFICATION_MAPPING",
    "FOR_QUESTION_ANSWERING_MAPPING", "FOR_MULTIPLE_CHOICE_MAPPING",
    "FOR_NEXT_SENTENCE_PREDICTION_MAPPING",
)  # fmt: skip
HOLES = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1, 0], [1] * 8])
ENDS = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1] * 8])


def heads():
    """Returns pairs (family, name of a model class) of this transformers."""
    found = []
    for family in FAMILIES:
        for task in TASKS:
            names = getattr(modeling_auto, f"MODEL_{task}_NAMES").get(family, ())
            found += [(family, name) for name in ((names,) if isinstance(names, str) else names)]
    return list(dict.fromkeys(found))


def outputs(model, tokens, mask):
    """Returns the floating-point outputs that the model computes for tokens, by name."""
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: value[None] for name, value in inputs.items()}
    shape = mask.shape
    found = {}
    for name, value in model(**inputs).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[name] = value[mask.bool()] if value.shape[:2] == shape else value
    return found


def gradients(model, found):
    generator = torch.Generator().manual_seed(4)
    total = 0
    for value in found.values():
        weight = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        total = (
            total + (value.clamp(-1e6, 1e6) * weight).sum()
        )  # masked answers have logits of -inf
    return torch.autograd.grad(total, list(model.parameters()), allow_unused=True)


@pytest.mark.parametrize(("family", "name"), heads(), ids=lambda value: value)
@pytest.mark.usefixtures("in_float64")
def test_padding_changes_no_output_and_no_gradient(family, name):
    """Rows begin with a token, which heads that pool a row read; `test_heads` pads on the left."""
    model = tiny_model(family, getattr(transformers, name)).eval()
    mask = ENDS if family == "modernbert" else HOLES  # whose windows are shorter than these rows
    tokens = torch.randint(5, 32, mask.shape, generator=torch.Generator().manual_seed(1))
    tokens = tokens.where(mask.bool(), model.config.pad_token_id or 0)
    expected = outputs(model, tokens, mask)
    wanted = gradients(model, expected)
    if name == "ModernBertForQuestionAnswering":
        with patch_model(model), pytest.raises(ValueError, match="its head compares all positions"):
            outputs(model, tokens, mask)
        return
    with patch_model(model):
        found = outputs(model, tokens, mask)
        derivatives = gradients(model, found)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_equal_in_float64(found[key], value)
    for one, other in zip(derivatives, wanted, strict=True):
        if other is not None and other.any():
            assert_equal_in_float64(one, other)
