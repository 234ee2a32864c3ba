"""Tests TRL's SFTTrainer with lctrain's attention: a pack's loss is that of its documents."""

import pytest
import torch

import lctrain  # noqa: F401  (registers lctrain_flash)
from tests.numerics import near_roundings

trl = pytest.importorskip("trl", reason="needs TRL")

LENGTHS = (30, 9, 60, 4)


def trained(tmp_path, attention: str, **settings) -> tuple[float, int]:
    """Returns the loss of one step over four documents, and the number of rows in its batch."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    words = Tokenizer(models.WordLevel({"<end>": 0}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )
    arguments = trl.SFTConfig(
        str(tmp_path / attention),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        **settings,
    )
    data = Dataset.from_dict({"input_ids": [list(range(3, 3 + n)) for n in LENGTHS]})
    rows = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    return trainer.train().training_loss, rows[0]


@pytest.mark.parametrize(
    "settings",
    [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}],
    ids=str,
)
def test_a_pack_of_trl_has_the_loss_of_its_documents(tmp_path, settings):
    """The reference is TRL on four padded rows, with transformers' attention and no packing."""
    apart, rows = trained(tmp_path, "sdpa")
    assert rows == len(LENGTHS)
    packed, rows = trained(tmp_path, "lctrain_flash", **settings)
    assert rows == 1
    # Both are means over the same tokens: two float32 sums of about a hundred terms.
    assert packed == near_roundings(apart, 2 * 100)


def test_conversations_have_the_labels_of_trl(tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lctrain.data.chat.conversation import read_conversation
    from lctrain.data.chat.source import Rendering
    from lctrain.data.chat.tokenizing import ChatTokenizing
    from tests.data.chat.conftest import CONVERSATIONS, make_tokenizer

    tokenizer = make_tokenizer("chatml_generation", merges=40)
    tokenizer.pad_token = tokenizer.eos_token
    records = [{"messages": CONVERSATIONS[name]["messages"]} for name in ("two_turns", "system")]
    arguments = trl.SFTConfig(
        str(tmp_path), assistant_only_loss=True, use_cpu=True, bf16=False, report_to="none"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_config(config),
        arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
    )
    ours = ChatTokenizing(tokenizer=tokenizer, rendering=Rendering("assistant", None, {}))
    rows = ours.tokenize([read_conversation(record) for record in records])
    for theirs, row in zip(trainer.train_dataset, rows, strict=True):
        labels = [-100] * len(row["input_ids"])
        for begin, end in row["spans"].reshape(-1, 2).tolist():
            labels[begin:end] = row["input_ids"][begin:end].tolist()
        assert theirs["input_ids"] == row["input_ids"].tolist()
        assert theirs["labels"] == labels
