"""Tests that no model and no step drops the groups of a batch: it serves or refuses them."""

import pickle

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
)

import lctrain
from lctrain import PackedBatch
from lctrain.callbacks.batches import view_batch
from lctrain.config import MemoryConfig
from lctrain.data.share import share_pack
from lctrain.groups import PatchedOnly
from lctrain.loss import causal_lm_loss, masked_lm_loss, token_log_probs
from lctrain.memory.policy import apply_config
from lctrain.module import LongContextModule
from tests.models.families import CAUSAL, make_model
from tests.numerics import assert_equal_in_float64
from tests.test_groups import GROUPS, completion_logits, results, separate

UNPATCHED = "shared prefixes must be flash, got a model that is not patched"


@pytest.fixture
def batch():
    return PackedBatch.from_groups(GROUPS)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_model_without_a_patch_is_an_error(family, training, batch):
    model = make_model(family, vocab_size=97).train(training)
    with pytest.raises(ValueError, match=UNPATCHED):
        model(**batch.model_kwargs())
    with pytest.raises(ValueError, match=UNPATCHED):
        model.base_model(**batch.model_kwargs())


def test_a_model_that_was_unpatched_is_an_error(make_llama, batch):
    model = make_llama()
    with lctrain.patch_model(model):
        assert model(**batch.model_kwargs()).logits.isfinite().all()
    with pytest.raises(ValueError, match=UNPATCHED):
        model(**batch.model_kwargs())


def test_a_model_with_checkpointing_is_an_error_without_a_patch(make_llama, batch):
    model = make_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=UNPATCHED):
        model(**batch.model_kwargs())


def test_adapters_hide_no_missing_patch(make_llama, batch):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=UNPATCHED):
        model(**batch.model_kwargs())
    lctrain.patch_model(model.get_base_model())
    assert model(**batch.model_kwargs()).logits.isfinite().all()


def test_the_guard_survives_copies_and_moves(batch):
    moved = pickle.loads(pickle.dumps(batch)).to("cpu")
    for content in (moved, view_batch(moved)):
        guard = content.model_kwargs()["use_cache"]
        assert isinstance(guard, PatchedOnly)
        with pytest.raises(ValueError, match="Call lctrain"):
            bool(guard)
    assert separate(GROUPS).model_kwargs()["use_cache"] is False


@pytest.mark.usefixtures("in_float64")
def test_a_model_by_name_serves_groups(make_llama):
    model = make_llama().double()
    named = AutoModelForCausalLM.from_config(model.config, attn_implementation="lctrain_flash")
    named.double().eval().load_state_dict(model.state_dict())
    lctrain.patch_model(model)
    batch = PackedBatch.from_groups(GROUPS)
    logits = completion_logits(named, batch)
    assert_equal_in_float64(logits, completion_logits(model, batch))
    assert_equal_in_float64(logits, completion_logits(named, separate(GROUPS)))


@pytest.mark.parametrize("loss", [causal_lm_loss, token_log_probs], ids=lambda f: f.__name__)
def test_losses_refuse_a_model_without_a_patch(make_llama, batch, loss):
    with pytest.raises(ValueError, match="prefixes must be flash, got sdpa"):
        loss(make_llama(), batch)


def test_encoders_are_refused(batch):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=97, num_attention_heads=2, **sizes)).eval()
    with pytest.raises(ValueError, match="prefixes must be flash, got sdpa"):
        masked_lm_loss(model, batch)
    lctrain.patch_model(model)
    for call in (masked_lm_loss, lambda model, batch: model(**batch.model_kwargs())):
        with pytest.raises(ValueError, match="must be causal, got a bidirectional layer"):
            call(model, batch)


def test_alibi_is_refused(batch):
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM"):
        lctrain.patch_model(model)
    with pytest.raises(ValueError, match=UNPATCHED):
        model(**batch.model_kwargs())


def test_groups_need_their_boundaries_and_take_no_cache(make_llama, batch):
    model = make_llama()
    lctrain.patch_model(model)
    packed = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    kept = {name: x for name, x in batch.model_kwargs().items() if name not in packed}
    with pytest.raises(ValueError, match="prefix_groups must come with the boundaries"):
        model(**kept)
    with pytest.raises(ValueError, match="use_cache must be False for packed inputs"):
        model(**batch.model_kwargs() | {"use_cache": True})
    with pytest.raises(ValueError, match="use_cache must be False for packed inputs"):
        model(**batch.model_kwargs(), past_key_values=DynamicCache())


def test_ranks_that_share_a_pack_refuse_groups(batch):
    with pytest.raises(ValueError, match="must not share a prefix where 2 ranks share a pack"):
        share_pack(batch, 2, 0)


@pytest.mark.usefixtures("in_float64")
def test_a_module_scores_groups_as_separate_documents(make_llama):
    module = LongContextModule(make_llama().double())
    module.configure_model()
    scores = []
    for batch in (PackedBatch.from_groups(GROUPS), separate(GROUPS)):
        with torch.no_grad():
            found = module.predict_step(batch, 0)
        scores.append(found[batch.labels[0] != -100])
    assert_equal_in_float64(*scores, dtype=torch.float32)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("fused", [False, True], ids=["own loss", "fused loss"])
def test_a_model_that_computes_its_own_loss_serves_groups(make_llama, fused):
    """Labels that are not shifted: the first token of a document has none."""
    model = make_llama().double()
    lctrain.patch_model(model, loss=fused)
    found = []
    for batch in (PackedBatch.from_groups(GROUPS), separate(GROUPS)):
        found.append(model(**batch.model_kwargs(), labels=batch.labels.roll(1, dims=-1)).loss)
    assert_equal_in_float64(*found)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", ["checkpoint", "offload"])
def test_memory_policies_serve_groups(make_llama, name):
    found = []
    for policy in (None, MemoryConfig(name=name)):
        model = make_llama().double().train()
        lctrain.patch_model(model)
        if policy is not None:
            apply_config(model, policy, 64, "true")
        found.append(results(model, PackedBatch.from_groups(GROUPS))[0])
    assert_equal_in_float64(found[1], found[0])
