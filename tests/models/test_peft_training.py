"""Tests LongContextModule with PEFT adapters: trained weights, resuming, and the export."""

import json

import pytest
import torch

from lctrain.config import AttentionConfig, OptimConfig
from lctrain.export import export_model
from lctrain.module import LongContextModule
from tests.float64 import float64_throughout
from tests.numerics import assert_equal_in_float64
from tests.training import loader, make_batch, make_trainer

peft = pytest.importorskip("peft")

BATCHES = [make_batch((5, 9, 3), seed) for seed in range(4)]
OPTIM = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)


class NoTokenizer:
    """Stands for a tokenizer in exports."""

    def save_pretrained(self, folder) -> None:
        """Writes nothing."""


@pytest.fixture
def make_module(make_llama):
    """Returns a function that makes a module with LoRA and dropout on all linear layers."""

    def make(model=None, **settings):
        config = peft.LoraConfig(
            **({"r": 4, "target_modules": "all-linear", "lora_dropout": 0.2} | settings),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(1)
        adapted = peft.get_peft_model(make_llama() if model is None else model, config)
        return LongContextModule(adapted, optim=OPTIM, attention=AttentionConfig(dropout=0.1))

    return make


@pytest.fixture
def trained(make_module, tmp_path):
    module = make_module()
    before = {name: weight.clone() for name, weight in module.model.named_parameters()}
    make_trainer(tmp_path, max_steps=4).fit(module, loader(BATCHES))
    module.model.eval()
    return module, before


def logits(model):
    with torch.no_grad():
        return model(**BATCHES[0].model_kwargs()).logits


def test_only_the_adapters_move(trained):
    module, before = trained
    moved = {n for n, p in module.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if "lora_" in name}
    assert module.patch_handle.model is module.model.get_base_model()


def test_a_resumed_run_is_bit_equal(make_module, tmp_path):
    packs = loader(BATCHES[:2])
    make_trainer(tmp_path, max_epochs=2).fit(whole := make_module(), packs)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(first := make_module(), packs)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make_module()
    make_trainer(tmp_path, max_epochs=2).fit(resumed, packs, ckpt_path=tmp_path / "x.ckpt")
    states = [module.state_dict() for module in (whole, resumed, first)]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    assert not all(torch.equal(states[2][name], value) for name, value in states[0].items())
    loaded = LongContextModule.load_from_checkpoint(
        tmp_path / "x.ckpt", weights_only=True, model=make_module().model
    )
    assert all(torch.equal(loaded.state_dict()[n], v) for n, v in first.state_dict().items())


def test_merging_keeps_the_logits_and_the_merged_model_is_exported(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    module, _ = trained
    with torch.no_grad(), float64_throughout():
        exact = module.model.double()
        before = logits(exact)
        module.model = module.model.merge_and_unload()
        assert_equal_in_float64(logits(module.model), before)
    module.model.float()
    folder = export_model(module, NoTokenizer(), tmp_path / "merged", 128)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    tokens = BATCHES[0].input_ids[:, :5]
    with torch.no_grad():
        module.patch_handle.unpatch()
        assert torch.equal(loaded(tokens).logits, module.model.eval()(tokens).logits)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 128


@pytest.mark.parametrize("named", [True, False], ids=["named-base", "base-without-a-name"])
def test_adapters_alone_are_exported_as_such(make_module, make_llama, tmp_path, named):
    base = make_llama()
    if named:
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
    module = make_module(base)
    make_trainer(tmp_path, max_steps=1).fit(module, loader(BATCHES))
    module.model.eval()
    before = logits(module.model)
    folder = export_model(module, NoTokenizer(), tmp_path / "adapters", 128)
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card
    assert "not a whole model" in card
    if named:
        assert "AutoPeftModelForCausalLM.from_pretrained" in card
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        assert "PeftModel.from_pretrained(base" in card
        loaded = peft.PeftModel.from_pretrained(make_llama(), folder)
    from lctrain import patch_model

    patch_model(loaded.get_base_model())
    assert torch.equal(logits(loaded.eval()), before)


def test_prompt_learning_is_refused_before_the_data(make_llama, tmp_path):
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        module = LongContextModule(peft.get_peft_model(make_llama(), config), optim=OPTIM)
        with pytest.raises(ValueError, match=r"virtual tokens stand in front .* Train LoRA"):
            module.configure_model()


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_in_front_of_a_pack_are_refused(make_llama, kind):
    """The patched model inside gets embeddings and a mask with the virtual tokens in them."""
    from lctrain import patch_model

    base = make_llama()
    patch_model(base)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if kind is peft.PromptEncoderConfig:
        options["encoder_hidden_size"] = 8
    model = peft.get_peft_model(base, kind(**options))
    tokens = torch.randint(2, 97, (2, 6))
    assert model(tokens, attention_mask=torch.ones_like(tokens)).logits.shape == (2, 9, 97)
    with pytest.raises(ValueError, match=r"got several with P\w+, whose virtual .* train LoRA"):
        model(tokens, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2]] * 2))
