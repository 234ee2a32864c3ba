"""Tests TRL's DPOTrainer and GRPOTrainer: lctrain's attention gives the losses of transformers'."""

import copy

import pytest
import torch

import lctrain
from tests.numerics import near_roundings

trl = pytest.importorskip("trl", reason="needs TRL")

WORDS = 64
TERMS = 2 * 200  # a loss and a gradient norm are float32 sums over about 200 tokens, in two orders
PAIRS = [
    {"prompt": "w3 w4 w5 w6", "chosen": " w7 w8", "rejected": " w9"},
    {"prompt": "w10", "chosen": " w11 w12 w13 w14 w15", "rejected": " w16 w17"},
    {"prompt": "w20 w21", "chosen": " w22", "rejected": " w23 w24 w25"},
]
BY_NAME, PATCHED = "lctrain_flash", "patch_model"


def make_model(attention: str):
    """Returns a tiny model: by name, or with transformers' attention and then patched."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,  # attention is then far from uniform
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    named = "sdpa" if attention == PATCHED else attention
    model = AutoModelForCausalLM.from_config(config, attn_implementation=named)
    if attention == PATCHED:
        lctrain.patch_model(model)
    return model


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, "<pad>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )


def settings(folder, rows: int) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": rows,
        "learning_rate": 1e-2,
        "optim": "sgd",  # Adam would turn a rounding of a small gradient into a whole step
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def logged(trainer, *names: str) -> dict[str, list[float]]:
    """Trains, and returns the logged values of both steps by name."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    return {name: [entry[name] for entry in steps] for name in names}


def assert_same(found: dict[str, list[float]], expected: dict[str, list[float]]) -> None:
    for name, values in expected.items():
        assert any(abs(value) > 1e-4 for value in values), f"{name} shows nothing"
        assert found[name] == [near_roundings(value, TERMS) for value in values], name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
def test_dpo_has_the_losses_and_gradients_of_transformers_attention(tmp_path, adapters):
    from datasets import Dataset

    def run(attention):
        model = make_model(attention)
        if adapters:  # the reference is the model without them
            peft = pytest.importorskip("peft")
            lora = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
            options = {"peft_config": lora}
        else:
            options = {"ref_model": make_model(attention)}
        trainer = trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**settings(tmp_path / attention, 3), beta=0.5),
            train_dataset=Dataset.from_list(PAIRS),
            processing_class=make_tokenizer(),
            **options,
        )
        return logged(trainer, "loss", "grad_norm", "rewards/margins")

    expected = run("sdpa")
    for attention in (BY_NAME, PATCHED):
        assert_same(run(attention), expected)


@pytest.mark.filterwarnings("ignore")
def test_grpo_has_the_samples_losses_and_gradients_of_transformers_attention(tmp_path):
    """The samples are equal, since the seed is, and probabilities differ by roundings only."""
    from datasets import Dataset

    def run(attention):
        texts = []

        def reward(completions, **kwargs):
            texts.extend(completions)
            return [float(sum(map(len, text.split()))) for text in completions]

        trainer = trl.GRPOTrainer(
            make_model(attention),
            reward_funcs=reward,
            args=trl.GRPOConfig(
                **settings(tmp_path / attention, 8),
                num_generations=4,
                max_completion_length=5,
                beta=0.0,
                epsilon=0.2,
            ),
            train_dataset=Dataset.from_list([{"prompt": pair["prompt"]} for pair in PAIRS[:2]]),
            processing_class=make_tokenizer(),
        )
        return logged(trainer, "grad_norm", "entropy"), copy.copy(texts)

    expected, texts = run("sdpa")
    assert len(set(texts)) > 1
    for attention in (BY_NAME, PATCHED):
        found, same = run(attention)
        assert same == texts
        assert_same(found, expected)
