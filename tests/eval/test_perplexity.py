import dataclasses
import math

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lctrain
from lctrain.data import TokenizedDocument
from lctrain.eval import longest_documents, perplexity_by_length, runner
from tests.eval.conftest import VOCABULARY
from tests.numerics import near

LENGTHS = [2, 13, 64]


@pytest.fixture(params=["packs", "rows"])
def model(request, make_llama):
    """A float64 model: patched, so it reads packs, or unpatched, so it reads rows."""
    llama = make_llama().double()
    nn.init.normal_(llama.lm_head.weight)  # far from uniform
    if request.param == "rows":
        yield llama
    else:
        with lctrain.patch_model(llama, attention="flash"):
            yield llama


def slow_losses(model, ids: np.ndarray, length: int) -> list[float]:
    """Returns the losses of one document, with one forward pass per token."""
    losses = []
    stride = max(1, round(length * 0.5))
    for target in range(1, len(ids)):
        if target <= length:
            start = 0
        else:
            blocks = math.ceil((target - length) / stride)  # later windows score a stride each
            stop = min(length + blocks * stride, len(ids) - 1)
            start = stop - length
        context = torch.from_numpy(ids[start:target])[None]
        with torch.no_grad():
            logits = model(input_ids=context, use_cache=False).logits[0, -1]
        losses.append(-logits.log_softmax(-1)[ids[target]].item())
    return losses


def test_equals_a_slow_direct_computation(model, documents) -> None:
    table = perplexity_by_length(model, documents, LENGTHS, max_tokens=64)
    for row, length in zip(table.rows, LENGTHS, strict=True):
        losses = [slow_losses(model, document.input_ids, length) for document in documents]
        losses = [part for part in losses if part]
        tokens = np.concatenate(losses)
        assert (row.length, row.tokens, row.documents) == (length, len(tokens), 3)
        assert row.loss == near(tokens.mean())
        assert row.perplexity == near(math.exp(tokens.mean()))
        residuals = [sum(part) - tokens.mean() * len(part) for part in losses]
        error = math.sqrt(3 / 2 * sum(r * r for r in residuals)) / len(tokens)
        assert row.stderr == near(error)
        assert row.perplexity_low == near(math.exp(row.loss - error))
        assert row.perplexity_high == near(math.exp(row.loss + error))
        assert row.gain == near(table.rows[0].loss - row.loss)


def test_uniform_model_has_the_perplexity_of_its_vocabulary(model, documents) -> None:
    nn.init.zeros_(model.lm_head.weight)
    for row in perplexity_by_length(model, documents, LENGTHS, max_tokens=64).rows:
        assert row.perplexity == near(VOCABULARY)
        assert row.stderr == near(0.0)
        assert row.gain == near(0.0)


class LooksBack(nn.Module):
    """Predicts the token `distance` positions back with probability 0.9, if it can see it.

    Otherwise its prediction is uniform, so its perplexity is known at every context length.
    """

    def __init__(self, distance: int):
        super().__init__()
        self.distance = distance
        self.embedding = nn.Embedding(VOCABULARY, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids, **kwargs) -> dict[str, torch.Tensor]:
        probabilities = torch.full((*input_ids.shape, VOCABULARY), 1 / VOCABULARY).double()
        seen = nn.functional.one_hot(input_ids, VOCABULARY)[:, : -self.distance + 1].double()
        probabilities[:, self.distance - 1 :] = 0.9 * seen + 0.1 / VOCABULARY
        return {"logits": probabilities.log()}


def test_model_that_needs_a_certain_context_gains_when_it_gets_it() -> None:
    distance, size = 12, 300
    ids = np.random.default_rng(0).integers(VOCABULARY, size=distance)
    document = TokenizedDocument("periodic", np.tile(ids, size // distance), 0)
    with pytest.warns(UserWarning, match="computes all of its logits at once"):
        table = perplexity_by_length(
            LooksBack(distance),
            [document],
            [11, 24, 400],
            max_tokens=400,
            min_context=distance,
        )
    short, enough, long = (row.perplexity for row in table.rows)
    assert short == near(VOCABULARY)
    assert enough == near(1 / (0.9 + 0.1 / VOCABULARY))
    assert long == near(enough)


@pytest.mark.parametrize("max_tokens", [13, 100, 10_000])
def test_batch_size_does_not_matter(max_tokens, model, documents) -> None:
    expected = perplexity_by_length(model, documents, [5, 13], max_tokens=60)
    table = perplexity_by_length(model, documents, [5, 13], max_tokens=max_tokens)
    for row, other in zip(table.rows, expected.rows, strict=True):
        assert dataclasses.asdict(row) == near(dataclasses.asdict(other))


def test_a_batch_is_computed_before_the_losses_of_the_last_one_are_awaited(
    model, documents, monkeypatch
) -> None:
    events = []
    compute, read = runner.token_losses, runner.HostCopy.wait

    def computed(*args):
        events.append("compute")
        return compute(*args)

    def awaited(copy):
        events.append("read")
        return read(copy)

    monkeypatch.setattr(runner, "token_losses", computed)
    monkeypatch.setattr(runner.HostCopy, "wait", awaited)
    perplexity_by_length(model, documents, [13], max_tokens=64)
    batches = len(events) // 2
    assert batches > 2
    assert events == ["compute", *["compute", "read"] * (batches - 1), "read"]


def test_order_of_documents_and_of_lengths_does_not_matter(model, documents) -> None:
    expected = perplexity_by_length(model, documents, [5, 13], max_tokens=60)
    table = perplexity_by_length(model, documents[::-1], [13, 5, 5], max_tokens=60)
    for row, other in zip(table.rows, expected.rows, strict=True):
        assert dataclasses.asdict(row) == near(dataclasses.asdict(other))


def test_documents_do_not_see_one_another(model, documents) -> None:
    together = perplexity_by_length(model, documents, [5, 60], max_tokens=120)
    alone = [perplexity_by_length(model, [d], [5, 60], max_tokens=120) for d in documents[:3]]
    for index, row in enumerate(together.rows):
        parts = [table.rows[index] for table in alone]
        assert row.tokens == sum(part.tokens for part in parts)
        expected = sum(part.loss * part.tokens for part in parts) / row.tokens
        assert row.loss == near(expected)


def test_lengths_beyond_every_document_give_the_same_row(model, documents) -> None:
    at_end, beyond = perplexity_by_length(model, documents, [44, 500], max_tokens=500).rows
    assert (at_end.short_documents, beyond.short_documents) == (2, 3)
    assert dataclasses.replace(beyond, length=44, short_documents=2) == at_end


def test_documents_shorter_than_the_shortest_length(model) -> None:
    documents = [TokenizedDocument("pair", np.array([3, 4]), 0)]
    first, second = perplexity_by_length(model, documents, [8, 16], max_tokens=16).rows
    assert (first.tokens, first.mean_context, first.gain) == (1, 1.0, 0.0)
    assert (second.tokens, second.mean_context, second.gain) == (1, 1.0, 0.0)
    assert second.loss == first.loss


def test_min_context_scores_the_same_late_tokens_at_every_length(model, documents) -> None:
    table = perplexity_by_length(model, documents, [4, 20], max_tokens=60, min_context=20)
    ids = documents[0].input_ids
    assert [row.tokens for row in table.rows] == [25, 25]
    assert [row.documents for row in table.rows] == [1, 1]
    expected = slow_losses(model, ids, 20)[19:]
    assert table.rows[1].loss == near(np.mean(expected))
    assert math.isnan(table.rows[1].stderr)


@pytest.mark.usefixtures("in_float64")
def test_model_keeps_its_mode_and_dropout_is_off(make_llama, documents) -> None:
    model = make_llama(attention_dropout=0.5)
    expected = perplexity_by_length(model, documents, [8], max_tokens=60)
    model.train()
    model.model.layers[0].eval()
    with lctrain.patch_model(model, attention="flash"):
        table = perplexity_by_length(model, documents, [8], max_tokens=60)
    assert table.rows[0].loss == near(expected.rows[0].loss)
    assert model.training
    assert not model.model.layers[0].training
    assert model.model.layers[1].self_attn.training


@pytest.mark.usefixtures("in_float64")
def test_recurrent_model_without_attention(documents) -> None:
    """Mamba cannot read packs, but rows padded on the right suit every causal model."""
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1, use_cache=False
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    table = perplexity_by_length(model, documents, [8], max_tokens=64)
    losses = [slow_losses(model, document.input_ids, 8) for document in documents]
    assert table.rows[0].loss == near(np.mean(np.concatenate(losses)))


def test_longest_documents_first(documents) -> None:
    sizes = [len(d.input_ids) for d in longest_documents(documents, 3)]
    assert sizes == [45, 17, 2]
    assert len(longest_documents(documents, None)) == 4
    sizes = [len(d.input_ids) for d in longest_documents(documents, 3, tokens=20)]
    assert sizes == [20, 17, 2]
    with pytest.raises(ValueError, match="documents must be at least 1, got 0"):
        longest_documents(documents, 0)


def test_progress_bar_counts_scored_tokens(make_llama, documents, capsys) -> None:
    perplexity_by_length(make_llama(), documents, [8, 64], max_tokens=64, progress=True)
    assert "122/122" in capsys.readouterr().err


BAD_CALLS = {
    "no-length": ({"lengths": []}, "lengths must name at least one"),
    "length-1": ({"lengths": [8, 1]}, "lengths must be at least 2, got 1"),
    "length-text": ({"lengths": ["8"]}, "lengths must be integers, got '8'"),
    "length-fraction": ({"lengths": [8.5]}, "lengths must be integers, got 8.5"),
    "length-too-long": ({"lengths": [8, 65]}, "at most max_tokens = 64, got 65. Raise"),
    "overlap": ({"overlap": 1.0}, r"overlap must be in \[0, 1\), got 1.0"),
    "min-context": ({"min_context": 0}, "min_context must be at least 1, got 0"),
    "short-documents": ({"min_context": 50}, "more than 50 tokens, got 4, the longest of 45"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_an_error_that_names_it(change, message, make_llama, documents) -> None:
    arguments = {"lengths": [8], "max_tokens": 64, **change}
    lengths = arguments.pop("lengths")
    with pytest.raises(ValueError, match=message):
        perplexity_by_length(make_llama(), documents, lengths, **arguments)


def test_no_documents_is_an_error(make_llama) -> None:
    with pytest.raises(ValueError, match=r"more than 1 token, got 0. Hold out"):
        perplexity_by_length(make_llama(), [], [8], max_tokens=64)


def test_tokens_of_another_tokenizer_are_an_error(make_llama, documents) -> None:
    with pytest.raises(ValueError, match="below the model's vocabulary of 50, got 96"):
        perplexity_by_length(make_llama(vocab_size=50), documents, [8], max_tokens=64)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
        (
            "OPT",
            {
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "ffn_dim": 16,
                "word_embed_proj_dim": 16,
                "max_position_embeddings": 32,
            },
        ),
    ],
)
def test_learned_positions_bound_the_length(name, sizes, documents) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert perplexity_by_length(model, documents, [32], max_tokens=64).rows[0].perplexity > 1
    with pytest.raises(ValueError, match=r"at most 32, the number of positions .* got 40"):
        perplexity_by_length(model, documents, [40], max_tokens=64)


@pytest.mark.parametrize("patched", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
@pytest.mark.usefixtures("in_float64")
def test_frequencies_that_follow_the_length_do_not_follow_the_batch(
    rope_type, patched, make_llama, documents
) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0}
    if rope_type == "longrope":
        rope |= {"original_max_position_embeddings": 16}
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    window = 64 if rope_type == "longrope" else 16
    model = make_llama(head_dim=8, rope_parameters=rope, max_position_embeddings=window)
    if patched:
        lctrain.patch_model(model)
    tables = [
        perplexity_by_length(model, documents, lengths, max_tokens=max_tokens)
        for lengths, max_tokens in (([8, 48], 48), ([8, 48], 4096), ([48], 512))
    ]
    losses = [table.rows[-1].loss for table in tables]
    assert losses == near([losses[0]] * 3)
    assert tables[0].rows[0].loss == near(tables[1].rows[0].loss)
