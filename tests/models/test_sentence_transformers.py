"""Tests sentence-transformers models: their encoder is patched inside, and computes no padding."""

import threading

import pytest
import torch

from lctrain.models import direct_calls, patch_models
from tests.models.families import make_model
from tests.models.test_unpadding import watch_tokens
from tests.numerics import assert_equal_in_float64

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvw")
SENTENCES = ["a b c", "d", "e f g h i j k a b c d e f", "w v u t s r"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of random encoders with a tokenizer of letters, by family."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    made = {}
    for family in ("bert", "modernbert"):
        made[family] = str(tmp_path_factory.mktemp(family))
        make_model(family).save_pretrained(made[family])
        tokenizer.save_pretrained(made[family])
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_embeddings_and_gradients(family, folders):
    """A folder without pooling gets the mean over the tokens of each sentence."""
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(folders[family], device="cpu").double().eval()
    tokenize = getattr(model, "preprocess", None) or model.tokenize  # the name before 6.0
    features = tokenize(SENTENCES)
    expected = model(dict(features))["sentence_embedding"]
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    inner = next(m for m in model.modules() if hasattr(m, "get_input_embeddings"))
    shapes = watch_tokens(inner.get_input_embeddings())
    with patch_models(model):
        found = model(dict(features))["sentence_embedding"]
        assert shapes[-1] == (1, int(features["attention_mask"].sum()))
        found.square().sum().backward()
        encoded = torch.as_tensor(model.encode(SENTENCES))
    assert_equal_in_float64(found, expected)
    assert_equal_in_float64(encoded, expected)
    for name, gradient in gradients.items():
        assert_equal_in_float64(dict(model.named_parameters())[name].grad, gradient)


def test_forward_runs_the_hooks_of_a_model_in_such_a_library(monkeypatch):
    """A stand-in for the library, which need not be installed."""
    holder = torch.nn.Module()
    holder.model = model = make_model("bert")
    own, expected = type(model), model.state_dict().keys()
    monkeypatch.setattr(direct_calls, "_LIBRARIES", ("torch.nn",))
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (tokens > 0).long()
    with torch.no_grad(), patch_models(holder) as patches:
        found = model.forward(tokens, attention_mask=mask).last_hidden_state
        assert torch.equal(found, model(tokens, attention_mask=mask).last_hidden_state)
        assert not found[mask == 0].any()
        assert "model.forward runs the hooks" in repr(patches)
        assert model.state_dict().keys() == expected
    assert type(model) is own


def test_a_forward_beside_another_thread_s_call_runs_the_hooks(monkeypatch):
    holder = torch.nn.Module()
    holder.model = model = make_model("bert")
    monkeypatch.setattr(direct_calls, "_LIBRARIES", ("torch.nn",))
    tokens, seen = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), []
    mask = (tokens > 0).long()

    def call_forward():
        with torch.no_grad():
            seen.append(model.forward(tokens, attention_mask=mask).last_hidden_state)

    def within(*_):
        if not seen:
            seen.append(None)  # the thread's own call passes here, too
            thread = threading.Thread(target=call_forward)
            thread.start()
            thread.join()

    with torch.no_grad(), patch_models(holder):
        model.encoder.register_forward_pre_hook(within)
        expected = model(tokens, attention_mask=mask).last_hidden_state
    assert torch.equal(seen[1], expected)
    assert not seen[1][mask == 0].any()
