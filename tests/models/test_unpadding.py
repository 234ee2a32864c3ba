"""Tests encoders on padded rows that are packed once, and padded again at the end."""

import copy

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from lctrain.attention.forward import BOUNDARIES_ARGUMENT
from lctrain.batch import PackedBatch
from lctrain.models import patch_model
from tests.models.families import make_documents, make_model, padded
from tests.models.test_heads import make_head
from tests.models.tiny import tiny_config, tiny_model
from tests.numerics import assert_equal_in_float64

LENGTHS = (6, 1, 11, 7)
FAMILIES = ("bert", "modernbert", "roberta", "distilbert", "electra", "albert", "nomic_bert")
HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 0], [0, 1, 1, 1, 0, 0, 0, 0], [1] * 8])


def encoder(family, auto="AutoModel", **overrides):
    mapping = getattr(modeling_auto, auto)._model_mapping
    return tiny_model(family, mapping[type(tiny_config(family))], **overrides)


def hidden(output):
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def rows_of(side):
    if side == "holes":
        tokens = torch.stack(make_documents([8, 8, 8]))
        return tokens * HOLES, HOLES
    return padded(make_documents(LENGTHS), side)


def watch_tokens(module):
    """Returns a list that gets the shape [B, S] of every input of a module."""
    shapes = []
    module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize(
    ("family", "auto"),
    [("bert", "AutoModel"), *((family, "AutoModelForMaskedLM") for family in FAMILIES)],
)
@pytest.mark.usefixtures("in_float64")
def test_outputs_and_gradients_are_those_of_the_padded_model(family, side, auto):
    model = encoder(family, auto)
    tokens, mask = rows_of(side)
    inputs, real = {"input_ids": tokens, "attention_mask": mask}, mask.bool()
    if side == "holes" and family == "modernbert":
        with patch_model(model), pytest.raises(ValueError, match="padding only at the ends of a"):
            model(**inputs)
        return
    expected = hidden(model(**inputs))
    cotangent = torch.randn_like(expected) * real[..., None]
    (expected * cotangent).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with patch_model(model) as handle:
        found = hidden(model(**inputs))
        assert "left out from the embeddings to the heads" in repr(handle)
        (found * cotangent).sum().backward()
    assert_equal_in_float64(found[real], expected[real])
    assert found.shape == expected.shape
    assert not found[~real].any()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None and gradient.any():
            assert_equal_in_float64(parameter.grad, gradient)
    assert torch.equal(hidden(model(**inputs)), expected)


@torch.no_grad()
@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForTokenClassif"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_no_layer_computes_padding(family, auto):
    model = make_head(family, auto.replace("Classif", "Classification"))
    tokens, mask = rows_of("right")
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding)]
    pooler = getattr(model, "pooler", None)
    seen = [watch_tokens(m) for m in linears if pooler is None or m is not pooler.dense]
    with patch_model(model):
        model(tokens, attention_mask=mask)
        total = int(mask.sum())
        assert {shape[-1] for shapes in seen for shape in shapes if len(shape) > 1} == {total}
        for shapes in seen:
            shapes.clear()
    assert patch_model(model, unpad=False).swaps[-1].name == "attention"
    model(tokens, attention_mask=mask)
    assert (len(LENGTHS), max(LENGTHS)) in {shape for shapes in seen for shape in shapes}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta", "distilbert", "electra"])
@pytest.mark.usefixtures("in_float64")
def test_classification_pools_each_document(family, side):
    """Rows that are padded on the left count columns from the padding on, as unpatched ones."""
    model = make_head(family, "AutoModelForSequenceClassification")
    documents = make_documents(LENGTHS)
    tokens, mask = padded(documents, side)
    expected = []
    for row, document in enumerate(documents):
        start = int(mask[row].argmax())
        first = 1 if family == "roberta" else start  # RoBERTa counts tokens, not columns
        positions = torch.arange(first, first + len(document))[None]
        expected.append(model(document[None], position_ids=positions).logits)
    labels = torch.tensor([0, 2, 1, 2])
    with patch_model(model):
        found = model(tokens, attention_mask=mask, labels=labels)
    assert_equal_in_float64(found.logits, torch.cat(expected))
    loss = torch.nn.functional.cross_entropy(torch.cat(expected), labels)
    assert_equal_in_float64(found.loss, loss)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_poolers_token_types_hidden_states_and_embeddings():
    model = make_model("bert")
    tokens, mask = rows_of("right")
    types = (torch.arange(tokens.shape[1]) > 2).long().expand_as(tokens)
    embeds = model.embeddings.word_embeddings(tokens)
    for inputs in (
        {"input_ids": tokens, "token_type_ids": types},
        {"inputs_embeds": embeds},
        {"input_ids": tokens, "position_ids": torch.arange(tokens.shape[1])[None] + 3},
    ):
        inputs |= {"attention_mask": mask, "output_hidden_states": True}
        expected = model(**inputs)
        with patch_model(model):
            found = model(**inputs)
            plain = model(**inputs, return_dict=False)
        assert_equal_in_float64(found.pooler_output, expected.pooler_output)
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_equal_in_float64(one[mask.bool()], other[mask.bool()])
            assert not one[mask == 0].any()
        assert_equal_in_float64(plain[0][mask.bool()], expected[0][mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("counted", ["tokens", "columns"])
@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.usefixtures("in_float64")
def test_position_ids_of_rows_with_padding_between_tokens(family, unpad, counted):
    """Positions at padding mean nothing, and do not divide a row into documents."""
    model, (tokens, mask) = encoder(family), rows_of("holes")
    first = 1 if family == "roberta" else 0  # RoBERTa counts from the padding token's id + 1
    positions = torch.arange(8) - mask.argmax(1, keepdim=True)
    positions = positions if counted == "columns" else mask.cumsum(1) - 1
    positions = positions.clamp(min=0).masked_fill(mask == 0, 1) + first
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    expected = hidden(model(**inputs))
    with patch_model(model, unpad=unpad):
        found = hidden(model(**inputs))
    assert_equal_in_float64(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 8), (8,)])
@pytest.mark.parametrize("tokens_left", [8, 11], ids=["as-many-as-columns", "more"])
@pytest.mark.usefixtures("in_float64")
def test_inputs_that_all_rows_share(shape, tokens_left):
    """The pack of 8 tokens is as long as a row, so that such an input would fit unexpanded."""
    model, tokens = make_model("bert"), torch.stack(make_documents([8, 8]))
    mask = (torch.arange(8) < torch.tensor([[tokens_left - 3], [3]])).long()
    types = (torch.arange(8) > 2).long().view(shape)
    positions = torch.arange(8).view(1, 8) + 3
    for extra in ({"token_type_ids": types}, {"position_ids": positions, "token_type_ids": types}):
        inputs = {"input_ids": tokens, "attention_mask": mask} | extra
        expected = hidden(model(**inputs))
        with patch_model(model):
            found = hidden(model(**inputs))
        assert_equal_in_float64(found[mask.bool()], expected[mask.bool()])


@torch.no_grad()
@pytest.mark.parametrize("family", ["modernbert", "mistral"])
def test_padding_within_windows_is_refused_without_unpadding_too(family):
    """Windows count tokens in the kernels, and columns in transformers."""
    model = make_model(family)
    tokens = torch.stack(make_documents([24, 24]))
    mask = torch.ones_like(tokens)
    mask[0, 9:12] = 0
    numbers = mask.clone()
    numbers[0, 12:] = 2
    with patch_model(model, unpad=False):
        with pytest.raises(
            ValueError, match=f"padding only at the ends of a row for (?i:{family})"
        ):
            model(tokens, attention_mask=mask)
        model(tokens, attention_mask=numbers)  # the padding lies between two documents
        mask[0, 12:] = 0
        model(tokens, attention_mask=mask)


@torch.no_grad()
@pytest.mark.usefixtures("in_float64")
def test_the_loss_of_token_labels():
    model = make_head("bert", "AutoModelForTokenClassification")
    tokens, mask = rows_of("left")
    labels = (tokens % 3).masked_fill(mask == 0, -100)
    expected = model(tokens, attention_mask=mask, labels=labels)
    with patch_model(model):
        found = model(tokens, attention_mask=mask, labels=labels)
    assert_equal_in_float64(found.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_name_serves_as_patch_model_does(family):
    model, (tokens, mask) = encoder(family), rows_of("right")
    with patch_model(copy.deepcopy(model)) as handle:
        expected = hidden(handle.model(tokens, attention_mask=mask))
    model.set_attn_implementation("lctrain_flash")
    found = hidden(model(tokens, attention_mask=mask))
    assert torch.equal(found, expected)
    assert not found[mask == 0].any()
    model.set_attn_implementation("sdpa")
    assert hidden(model(tokens, attention_mask=mask))[mask == 0].any()


def test_packs_rows_without_padding_and_empty_rows():
    model, documents = make_model("bert"), make_documents(LENGTHS)
    with patch_model(model), torch.no_grad():
        pack = model(**PackedBatch.from_documents(documents).model_kwargs())
        assert pack.last_hidden_state.shape[:2] == (1, sum(LENGTHS))
        assert pack.pooler_output.shape[0] == len(LENGTHS)
        full = torch.ones((2, 5), dtype=torch.int64)
        assert model(full, attention_mask=full).last_hidden_state.all()
        for empty in (full * torch.tensor([[1], [0]]), full * 0):
            found = model(full, attention_mask=empty).last_hidden_state
            assert found.isfinite().all()
            assert not empty.any() or not found[empty == 0].any()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradient_checkpointing_and_autocast(family):
    model, (tokens, mask) = encoder(family).train(), rows_of("right")
    patch_model(model, dropout=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = hidden(model(tokens, attention_mask=mask))
        output.float().square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not output[mask == 0].any()


@pytest.mark.slow  # torch.compile takes most of the time; nothing else compiles padded rows
@torch.no_grad()
def test_compiled():
    model, (tokens, mask) = make_model("bert", num_hidden_layers=1), rows_of("right")
    patch_model(model)
    expected = hidden(model(tokens, attention_mask=mask))
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(hidden(compiled(tokens, attention_mask=mask)), expected)
    longer = mask.clone()
    longer[1, :4] = 1
    expected = hidden(model(tokens, attention_mask=longer))
    assert torch.equal(hidden(compiled(tokens, attention_mask=longer)), expected)


@pytest.mark.parametrize(
    ("family", "auto", "reason"),
    [
        ("llama", "AutoModelForCausalLM", "its attention is causal"),
        (
            "bert",
            "AutoModelForQuestionAnswering",
            "its head compares all positions of a row, padding ",
        ),
        ("xmod", "AutoModel", "XmodModel has one language per row"),
        ("esm", "AutoModel", "its embeddings read the attention mask"),
    ],
)
def test_models_that_cannot_be_unpadded_are_refused(family, auto, reason):
    overrides = {"mask_token_id": 3} if family == "esm" else {}
    model = encoder(family, auto, **overrides)
    with pytest.raises(ValueError, match=f"unpad=True needs an encoder .*, got .*: {reason}"):
        patch_model(model, unpad=True)
    assert "padding" not in [swap.name for swap in patch_model(model).swaps]


@pytest.mark.parametrize("family", ["DebertaV2", "MPNet", "ConvBert"])
def test_models_that_cannot_be_patched_say_why(family):
    name = f"{family}Model"
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, f"{family}Config")())
    with pytest.raises(ValueError, match=f"model must .* got {name}"):
        patch_model(model, unpad=True)


def test_bad_inputs():
    model, (tokens, mask) = make_model("bert"), rows_of("right")
    with pytest.raises(ValueError, match="unpad must be True or False, got 'yes'"):
        patch_model(model, unpad="yes")
    patch_model(model)
    with pytest.raises(ValueError, match="attention_mask must be 0 at padding and 1 at real"):
        model(tokens, attention_mask=(1.0 - mask) * -1e9)
    with pytest.raises(ValueError, match="attention_mask must have the inputs' shape"):
        model(tokens, attention_mask=mask[:, 1:])
    long = torch.ones((2, 65), dtype=torch.int64)
    with pytest.raises(ValueError, match="rows must be at most 64, the number of positions"):
        model(long, attention_mask=long * (torch.arange(65) > 3))


def test_restored_rows_belong_to_the_model_that_packed_them():
    """The head of a masked language model gets packed states from the encoder inside it."""
    model = encoder("bert", "AutoModelForMaskedLM")
    tokens, mask = rows_of("right")
    seen = []
    model.bert.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((kwargs[BOUNDARIES_ARGUMENT], out[0].shape[:2])),
        with_kwargs=True,
    )
    with patch_model(model), torch.no_grad():
        model(tokens, attention_mask=mask)
    (boundaries, shape), total = seen[0], int(mask.sum())
    assert tuple(shape) == (1, total)
    assert boundaries.padding.owner == "BertForMaskedLM"


@torch.no_grad()
@pytest.mark.parametrize("by_name", [False, True], ids=["patched", "by-name"])
def test_hooks_of_the_user_see_rows_and_no_output_is_checked_twice(by_name):
    """A model that was selected by name has the checks already when it is patched."""
    model, (tokens, mask) = make_model("bert"), rows_of("right")
    shapes = []
    model.register_forward_hook(lambda _, args, out: shapes.append(tuple(out[0].shape[:2])))
    if by_name:
        model.set_attn_implementation("lctrain_flash")
        model(tokens, attention_mask=mask)
    with patch_model(model):
        found = model(tokens, attention_mask=mask)
    assert set(shapes) == {tuple(tokens.shape)}
    assert found.pooler_output.shape[0] == len(LENGTHS)


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPSegTextModel", "MetaClip2TextModel"])
def test_models_that_ask_for_causal_attention_per_call_keep_padding(name):
    model_class = getattr(transformers, name)
    model = tiny_model(model_class.config_class.model_type, model_class)
    tokens, mask = rows_of("right")
    expected = hidden(model(tokens, attention_mask=mask))
    with pytest.raises(ValueError, match=r"unpad=True needs .*: its forward asks for causal"):
        patch_model(model, unpad=True)
    patch_model(model)
    found = hidden(model(tokens, attention_mask=mask))
    assert found.shape == expected.shape


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
@pytest.mark.usefixtures("in_float64")
def test_heads_for_questions_read_padding(family, side):
    model = make_head(family, "AutoModelForQuestionAnswering", num_labels=2)
    tokens, mask = rows_of(side)
    labels = torch.full((len(tokens),), 1)
    inputs = {"input_ids": tokens, "attention_mask": mask, "start_positions": labels}
    expected = model(**inputs, end_positions=labels)
    with patch_model(model):
        if family != "bert":
            with pytest.raises(ValueError, match="padding"):
                model(**inputs, end_positions=labels)
            return
        found = model(**inputs, end_positions=labels)
    assert_equal_in_float64(found.start_logits, expected.start_logits)
    assert_equal_in_float64(found.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_forward_inspects_no_code(family, monkeypatch):
    model = encoder(family)
    tokens, mask = rows_of("right")
    patch_model(model)

    def refuse(cls):
        raise AssertionError(f"inspected {cls.__name__}")

    monkeypatch.setattr("lctrain.models.code.methods", refuse)
    monkeypatch.setattr("lctrain.models.architectures.methods", refuse)
    model(tokens, attention_mask=mask)


def test_layers_share_a_schedule_that_the_cpu_built(monkeypatch):
    """On a GPU the pack of a padded batch carries its tile schedule, so no layer builds one."""
    from lctrain.kernels import make_schedule
    from lctrain.models import unpadding

    monkeypatch.setattr(unpadding, "_moved", lambda values, device: values)
    mask = torch.zeros(3, 300, dtype=torch.int64)
    lengths = [300, 1, 129]
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    found = unpadding.find_unpadded(mask, torch.device("cuda"), None)
    schedule, wanted = found.pack.schedule, make_schedule(lengths)
    assert torch.equal(schedule.q_tiles, wanted.q_tiles)
    assert torch.equal(schedule.k_tiles, wanted.k_tiles)
    assert schedule[2:] == wanted[2:]
