"""Tests models with heads such as classifiers on packs: one row per document, or an error."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.models.families import make_documents, padded
from tests.models.tiny import config_for, sharpen, tiny_config
from tests.numerics import assert_equal_in_float64

LENGTHS = (6, 1, 11, 7)
DECODERS = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "opt", "gpt_neox")
ENCODERS = ("bert", "modernbert", "electra", "albert", "distilbert", "ernie")


def make_head(family, auto, **overrides):
    """Returns a tiny random model of a family with the head of an Auto class, or skips."""
    config = tiny_config(family)
    mapping = getattr(modeling_auto, auto)._model_mapping
    if type(config) not in mapping:
        pytest.skip(f"{family} has no such head")
    model_class = mapping[type(config)]
    config = config_for(model_class, config)
    config.pad_token_id, config.num_labels = 0, 3
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = model_class(config).eval()
    if family == "gemma2":  # up to transformers 5.22 its default is SDPA, which has no soft cap
        model.set_attn_implementation("eager")
    sharpen(model)
    return model


def give_attention(model, by_name):
    model.set_attn_implementation("lctrain_flash") if by_name else patch_model(model)


def pack(documents, **extra):
    arguments = PackedBatch.from_documents(documents).model_kwargs()
    arguments.pop("use_cache")
    return arguments | extra


def skip_unsupported(model):
    from lctrain.models.architectures import require_supported

    try:
        require_supported(model)
    except ValueError as error:
        pytest.skip(str(error))


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
@pytest.mark.usefixtures("in_float64")
def test_sequence_classification(family, by_name):
    model = make_head(family, "AutoModelForSequenceClassification")
    skip_unsupported(model)
    documents = make_documents(LENGTHS)
    expected = torch.cat([model(tokens[None]).logits for tokens in documents])
    labels = torch.tensor([0, 2, 1, 2])
    loss = nn.functional.cross_entropy(expected, labels)
    give_attention(model, by_name)
    found = model(**pack(documents, labels=labels))
    assert_equal_in_float64(found.logits, expected)
    assert_equal_in_float64(found.loss, loss)
    rows, mask = padded(documents, "right")
    assert_equal_in_float64(model(rows, attention_mask=mask).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["position_ids", "numbers"])
@pytest.mark.usefixtures("in_float64")
def test_sequence_classification_told_otherwise(told_by):
    model = make_head("llama", "AutoModelForSequenceClassification")
    documents = make_documents(LENGTHS)
    expected = torch.cat([model(tokens[None]).logits for tokens in documents])
    patch_model(model)
    tokens = torch.cat([*documents, torch.zeros(2, dtype=torch.int64)])[None]
    numbers = [i + 1 for i, one in enumerate(documents) for _ in one] + [0, 0]
    told = {"attention_mask": torch.tensor([numbers])}
    if told_by == "position_ids":
        told = {
            "attention_mask": (told["attention_mask"] > 0).long(),
            "position_ids": torch.cat([torch.arange(len(t)) for t in (*documents, [0, 0])])[None],
        }
    assert_equal_in_float64(model(tokens, **told).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("told_by", ["position_ids", "numbers"])
@pytest.mark.usefixtures("in_float64")
def test_a_row_of_padding_beside_a_row_of_two_documents(told_by):
    model = make_head("llama", "AutoModelForSequenceClassification")
    documents = make_documents((6, 11))
    expected = torch.cat([model(tokens[None]).logits for tokens in documents])
    patch_model(model)
    tokens = torch.stack([torch.cat(documents), torch.zeros(17, dtype=torch.int64)])
    told = {"attention_mask": torch.tensor([[1] * 6 + [2] * 11, [0] * 17])}
    if told_by == "position_ids":
        positions = torch.cat([torch.arange(6), torch.arange(11)])
        told = {
            "attention_mask": (told["attention_mask"] > 0).long(),
            "position_ids": positions.expand(2, -1),
        }
    assert_equal_in_float64(model(tokens, **told).logits, expected)


@pytest.mark.usefixtures("in_float64")
def test_gradients_of_packed_classification():
    model = make_head("llama", "AutoModelForSequenceClassification").double()
    documents = make_documents(LENGTHS)
    labels = torch.tensor([0, 2, 1, 2])
    logits = torch.cat([model(tokens[None]).logits for tokens in documents])
    nn.functional.cross_entropy(logits, labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    patch_model(model)
    model(**pack(documents, labels=labels)).loss.backward()
    for name, parameter in model.named_parameters():
        # norms are float32 inside transformers
        assert_equal_in_float64(parameter.grad, expected[name])


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.parametrize("told", ["left", "right", "pack"])
@pytest.mark.usefixtures("in_float64")
def test_hidden_states_of_a_head_stay_in_their_places(family, told):
    model = make_head(family, "AutoModelForSequenceClassification")
    documents = make_documents(LENGTHS)
    rows, mask = padded(documents, "right" if told == "pack" else told)
    inputs = {"input_ids": rows, "attention_mask": mask}
    if family == "llama":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    real = mask.bool()
    give_attention(model, by_name=told == "right")
    if told == "pack":
        inputs, expected = pack(documents), [state[real][None] for state in expected]
        real = torch.ones(1, sum(LENGTHS), dtype=torch.bool)
    found = model(**inputs, output_hidden_states=True).hidden_states
    plain = model(**inputs, output_hidden_states=True, return_dict=False)[-1]
    for one, other, state in zip(found, plain, expected, strict=True):
        assert one.shape == state.shape
        assert_equal_in_float64(one[real], state[real])
        assert torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "electra", "modernbert"])
@pytest.mark.usefixtures("in_float64")
def test_question_answering(family, by_name):
    model = make_head(family, "AutoModelForQuestionAnswering", num_labels=2)
    skip_unsupported(model)
    documents = make_documents(LENGTHS)
    expected = [model(tokens[None]) for tokens in documents]
    give_attention(model, by_name)
    found = model(**pack(documents))
    for row, one in enumerate(expected):
        length = LENGTHS[row]
        assert_equal_in_float64(found.start_logits[row, :length], one.start_logits[0])
        assert_equal_in_float64(found.end_logits[row, :length], one.end_logits[0])


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "electra", "modernbert"])
@pytest.mark.usefixtures("in_float64")
def test_token_classification_stays_per_token(family, by_name):
    model = make_head(family, "AutoModelForTokenClassification")
    skip_unsupported(model)
    documents = make_documents(LENGTHS)
    expected = torch.cat([model(tokens[None]).logits[0] for tokens in documents])
    give_attention(model, by_name)
    assert_equal_in_float64(model(**pack(documents)).logits[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
@pytest.mark.usefixtures("in_float64")
def test_multiple_choice(by_name):
    """Rows of choices work; a pack cannot say which documents are choices of one question."""
    model = make_head("bert", "AutoModelForMultipleChoice")
    rows = torch.stack(make_documents([9, 9, 9, 9])).view(2, 2, 9)
    mask = torch.ones_like(rows)
    mask[1, 1, 5:] = 0
    expected = model(rows, attention_mask=mask).logits
    give_attention(model, by_name)
    assert_equal_in_float64(model(rows, attention_mask=mask).logits, expected)
    with pytest.raises(ValueError, match=r"choices must come as rows .* got a pack"):
        model(**pack(make_documents(LENGTHS)))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.usefixtures("in_float64")
def test_an_encoder_pools_per_document(family):
    name = {"bert": "BertModel", "albert": "AlbertModel"}[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config(family)).eval()
    documents = make_documents(LENGTHS)
    expected = [model(tokens[None]) for tokens in documents]
    patch_model(model)
    found = model(**pack(documents))
    assert_equal_in_float64(found.pooler_output, torch.cat([one.pooler_output for one in expected]))
    assert_equal_in_float64(
        found.last_hidden_state[0], torch.cat([one.last_hidden_state[0] for one in expected])
    )


@torch.no_grad()
def test_a_pooled_output_as_wide_as_the_pack_is_long():
    """The output's shape [1, T] could also be a value per token; it must still be refused."""
    model = transformers.CLIPTextModel(tiny_config("clip_text_model")).eval()
    patch_model(model)
    lengths = (20, model.config.hidden_size - 20)
    with pytest.raises(ValueError, match=r"got pooler_output \[1, 32\] from CLIPTextModel for 2"):
        model(**pack(make_documents(lengths)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertForNextSentencePrediction", "BertForPreTraining"])
@pytest.mark.usefixtures("in_float64")
def test_next_sentence(name):
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny_config("bert")).eval()
    documents = make_documents(LENGTHS)
    field = "logits" if "Next" in name else "seq_relationship_logits"
    expected = torch.cat([model(tokens[None])[field] for tokens in documents])
    patch_model(model)
    assert_equal_in_float64(model(**pack(documents))[field], expected)


class Reward(transformers.LlamaPreTrainedModel):
    """A custom head that scores the last token."""

    def __init__(self, config):
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        inner = self.model(input_ids, attention_mask, position_ids, **kwargs)
        return (self.score(inner.last_hidden_state[:, -1]),)


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
def test_a_head_of_one_s_own_that_loses_documents_is_an_error(by_name):
    model = Reward(tiny_config("llama")).eval()
    give_attention(model, by_name)
    documents = make_documents(LENGTHS)
    with pytest.raises(ValueError, match=r"got 0 \[1, 1\] from Reward for 4 documents. Pass one"):
        model(**pack(documents))
    assert model(**pack(documents[:1]))[0].shape == (1, 1)
    rows, mask = padded(documents, "left")
    assert model(rows, attention_mask=mask)[0].shape == (4, 1)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_without_a_padding_token():
    encoder = make_head("bert", "AutoModelForSequenceClassification", pad_token_id=None)
    rows, mask = padded(make_documents(LENGTHS), "right")
    expected = encoder(rows, attention_mask=mask).logits
    patch_model(encoder)  # its head pools the first token
    assert_equal_in_float64(encoder(rows, attention_mask=mask).logits, expected)
    model = make_head("llama", "AutoModelForSequenceClassification", pad_token_id=None)
    patch_model(model)
    with pytest.raises(ValueError, match=r"pad_token_id must be set .* Set model.config"):
        model(**pack(make_documents(LENGTHS)))


def test_an_output_per_predicted_token_is_not_refused(make_llama):
    """TRL's trainers replace a causal model's forward by one that returns [B, S - 1]."""
    model = make_llama()
    forward = model.forward

    def shifted(*args, **kwargs):
        output = forward(*args, **kwargs)
        output["log_probs"] = output.logits.log_softmax(-1)[:, :-1, 0]
        return output

    model.forward = shifted
    batch = PackedBatch.from_documents([[5, 6, 7], [8, 9]])
    with patch_model(model), torch.no_grad():
        assert model(**batch.model_kwargs()).log_probs.shape == (1, 4)
