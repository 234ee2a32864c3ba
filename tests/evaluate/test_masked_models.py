"""lctrain-eval on a stored masked language model: the task masked_perplexity."""

import json
import math

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lctrain.batch import IGNORE_INDEX, PackedBatch
from lctrain.config import AttentionConfig, PretrainedModelConfig
from lctrain.data import MaskTokens, TokenizedDocument
from lctrain.eval import Run, Subject
from lctrain.eval.reading import GivenReading
from lctrain.eval.tasks.masked import MaskedPerplexity
from lctrain.eval.tasks.perplexity import Perplexity
from lctrain.evaluate import evaluate
from lctrain.models.pretrained import stored_task
from tests.evaluate.conftest import TEXTS
from tests.numerics import near

pytestmark = pytest.mark.usefixtures("float64_stays_float64")


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A random float64 ModernBERT over bytes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("modernbert")
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>", "<mask>", "<pad>"]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", mask_token="<mask>", pad_token="<pad>"
    ).save_pretrained(folder)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": 258 for name in ("pad", "bos", "eos", "cls", "sep")}
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(**sizes | layers | ids)
    model = transformers.ModernBertForMaskedLM(config).double()
    with torch.no_grad():
        model.decoder.bias[letters.index("e")] = 1.0  # so that some tokens are found
    model.save_pretrained(folder)
    return folder


def by_hand(folder, length, fraction=0.15):
    """Returns the mean loss, the share of right tokens and the number of masked tokens."""
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    masking = MaskTokens.of(tokenizer, fraction)
    loss = right = count = 0
    for text in TEXTS:
        ids = tokenizer(text + "<end>", return_tensors="np").input_ids[0]
        batch = masking(PackedBatch.from_documents([ids]))
        pairs = zip(batch.input_ids[0].split(length), batch.labels[0].split(length), strict=True)
        for tokens, labels in pairs:
            chosen = labels != IGNORE_INDEX
            with torch.no_grad():
                logits = model(tokens[None]).logits[0][chosen]
            losses = torch.nn.functional.cross_entropy(logits, labels[chosen], reduction="sum")
            loss += losses.item()
            right += int((logits.argmax(-1) == labels[chosen]).sum())
            count += int(chosen.sum())
    return loss / count, right / count, count


@pytest.mark.parametrize("attention", [AttentionConfig(), None], ids=["packs", "windows"])
def test_the_default_task_fills_in_masked_tokens(attention, encoder_folder, make_config):
    config = make_config(encoder_folder, data={"mask_fraction": 0.5}, attention=attention)
    evaluation = evaluate(config)
    assert list(evaluation.tables) == ["masked_perplexity"]
    rows = evaluation.tables["masked_perplexity"].as_dicts()
    assert [row["length"] for row in rows] == [8, 64]
    for row in rows:
        loss, accuracy, count = by_hand(encoder_folder, row["length"], 0.5)
        assert row["loss"] == near(loss)
        assert row["accuracy"] == near(accuracy)
        assert row["perplexity"] == near(math.exp(loss))
        assert count > 50
        assert 0 < accuracy < 1
    stored = evaluation.paths["masked_perplexity json"].read_text()
    assert json.loads(stored)["rows"][0]["accuracy"] == near(rows[0]["accuracy"])
    text = str(evaluation)
    assert "Masked perplexity" in text
    shown = text.partition("Perplexity of masked tokens")[2].splitlines()[2].split()
    assert shown == [f"{math.exp(row['loss']):,.3f}" for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["perplexity"]}, r"\[masked_perplexity\] for a masked language model, got perp"),
        ({"tasks": ["masked_perplexity", "passkey"]}, "got passkey, which needs a causal one"),
        ({"methods": ["plain"]}, r"methods must be empty for a masked language model, got \['plai"),
    ],
)
def test_what_needs_a_causal_model_is_refused(changes, message, encoder_folder, make_config):
    with pytest.raises(ValueError, match=message):
        evaluate(make_config(encoder_folder, **changes))


def test_what_needs_a_masked_model_is_refused(model_folder, make_config):
    with pytest.raises(ValueError, match="got masked_perplexity, which needs a masked one, with a"):
        evaluate(make_config(tasks=["masked_perplexity"]))
    with pytest.raises(ValueError, match=r"must be null for a causal model, got 0\.3"):
        evaluate(make_config(data={"mask_fraction": 0.3}))
    assert stored_task(PretrainedModelConfig(name_or_path=str(model_folder))) == "causal"


def test_the_runner_checks_the_model_too(make_llama):
    """Runs of Python and callbacks refuse a task of another kind of model before they begin."""
    tokens = [TokenizedDocument("a", torch.arange(9).numpy(), 0)]
    subject = Subject(make_llama(), documents=tokens)
    with pytest.raises(ValueError, match="needs a masked one, with a LlamaForCausalLM"):
        Run.prepared(MaskedPerplexity(), subject, [GivenReading()], (8,), max_tokens=8)
    Run.prepared(Perplexity(), subject, [GivenReading()], (8,), max_tokens=8)


def test_a_tokenizer_must_have_a_mask_token(encoder_folder, model_folder, make_config):
    config = make_config(encoder_folder, data={"tokenizer": str(model_folder)})
    with pytest.raises(ValueError, match="tokenizer must"):
        evaluate(config)
