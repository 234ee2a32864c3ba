"""Tests PEFT adapters on packs: LoRA trains exactly; other methods raise an error."""

import pytest
import torch

import lctrain
from lctrain.loss import causal_lm_loss
from tests.numerics import assert_equal_in_float64

peft = pytest.importorskip("peft")
DOCUMENTS = [list(range(3, 12)), list(range(20, 37)), [5, 6]]


@pytest.fixture
def lora(make_llama):
    """A patched tiny Llama in float64, with LoRA adapters that are not zero."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_llama().double(), config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lctrain.patch_model(model.get_base_model())
    return model


def losses(model, documents):
    """Returns the summed loss and the gradients of the adapters."""
    model.zero_grad()
    batch = lctrain.PackedBatch.from_documents(documents)
    loss, _ = causal_lm_loss(model.get_base_model(), batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.usefixtures("in_float64")
def test_lora_on_a_pack_equals_the_documents_alone(lora):
    packed, gradients = losses(lora, DOCUMENTS)
    alone = [losses(lora, [document]) for document in DOCUMENTS]
    assert_equal_in_float64(packed, sum(loss for loss, _ in alone))
    assert gradients
    assert all("lora" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_equal_in_float64(gradient, sum(grads[name] for _, grads in alone))


@pytest.mark.usefixtures("in_float64")
def test_merged_adapters_give_the_same_logits(lora):
    lora.eval()
    batch = lctrain.PackedBatch.from_documents(DOCUMENTS)
    with torch.no_grad():
        before = lora(**batch.model_kwargs()).logits
        merged = lora.merge_and_unload()
        assert_equal_in_float64(merged(**batch.model_kwargs()).logits, before)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
    ],
    ids=["lora", "saved", "tokens"],
)
def test_adapted_embeddings_have_a_vocabulary(make_llama, options):
    """PEFT's layers of embeddings have no num_embeddings."""
    from types import SimpleNamespace

    from lctrain.data.vocabulary import check_vocabulary
    from lctrain.eval.limits import check_model

    base = make_llama()
    size = base.config.vocab_size
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, **options))
    prompts = [[3, 4], [size - 1]]
    assert len(lctrain.generate(model, prompts, max_new_tokens=2, temperature=0)) == 2
    batch = lctrain.PackedBatch.from_documents([[3, size]])
    for check in (
        lambda: lctrain.generate(model, [[3, size]]),
        lambda: check_model(model, [torch.tensor([3, size]).numpy()], 2),
        lambda: check_vocabulary(batch, SimpleNamespace(model=model)),
    ):
        with pytest.raises(ValueError, match=f", got {size}. Tokenize them with the model's own"):
            check()


def test_the_wrapper_itself_is_refused_with_the_way_in(make_llama):
    model = peft.get_peft_model(make_llama(), peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"patch_model\(model.get_base_model\(\)\)"):
        lctrain.patch_model(model)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_in_front_of_a_pack_are_refused(make_llama, config):
    model = make_llama()
    lctrain.patch_model(model)
    tuned = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = lctrain.PackedBatch.from_documents(DOCUMENTS)
    with pytest.warns(), pytest.raises(ValueError, match=r"Prompt tuning .* train LoRA on packs"):
        tuned(**batch.model_kwargs())


def test_prefixes_in_a_cache_are_refused(make_llama):
    model = make_llama()
    lctrain.patch_model(model)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(model, config)
    batch = lctrain.PackedBatch.from_documents(DOCUMENTS)
    with pytest.raises(ValueError, match="Prefix tuning passes such a cache"):
        tuned(**batch.model_kwargs())
