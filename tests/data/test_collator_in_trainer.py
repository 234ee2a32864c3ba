"""Tests PackCollator in transformers' Trainer: equal token weights, and isolated documents."""

import copy

import pytest
import torch
from torch.nn import functional

import lctrain
from lctrain.data import PackCollator
from tests.numerics import assert_equal_in_float64, assert_error_at_most_twice, near

pytest.importorskip("accelerate")

DOCUMENTS = [
    {"input_ids": [3 + (7 * i + 5 * t) % 90 for t in range(length)]}
    for i, length in enumerate((6, 1, 17, 9, 4, 12, 8, 2, 5, 21, 3, 11))
]
RATE, PACK, ACCUMULATED = 0.1, 2, 2  # documents of a pack, packs of an optimizer step


@pytest.fixture
def make_trainer(tmp_path, make_llama):
    """Returns a function that makes a Trainer: a patched model, plain SGD, 3 optimizer steps."""
    from transformers import Trainer, TrainingArguments

    def make(model, collator, **settings):
        defaults = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": PACK,
            "per_device_eval_batch_size": PACK,
            "gradient_accumulation_steps": ACCUMULATED,
            "max_steps": 3,
            "optim": "sgd",
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return Trainer(
            model=model,
            args=TrainingArguments(**(defaults | settings)),
            train_dataset=DOCUMENTS,
            eval_dataset=DOCUMENTS,
            data_collator=collator,
        )

    return make


def separate_losses(model, documents):
    """Returns the summed token loss of documents run one by one, and the number of targets."""
    total, count = 0.0, 0
    for document in documents:
        tokens = torch.tensor(document["input_ids"])
        logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
        total = total + functional.cross_entropy(logits, tokens[1:], reduction="sum")
        count += len(tokens) - 1
    return total, count


def train_separately(model):
    """Returns weights and losses of three SGD steps with one document per forward pass."""
    losses = []
    model.train()
    for start in range(0, len(DOCUMENTS), PACK * ACCUMULATED):
        total, count = separate_losses(model, DOCUMENTS[start : start + PACK * ACCUMULATED])
        model.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
        losses.append((total / count).detach())
    return torch.cat([flat(model), torch.stack(losses)])


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("loss", [False, True], ids=["logits", "fused-loss"])
def test_steps_equal_those_of_separate_documents(make_trainer, make_llama, loss):
    plain, exact = make_llama(), make_llama().double()
    expected, reference = train_separately(plain), train_separately(exact)
    model = make_llama()
    lctrain.patch_model(model, loss=loss)
    trainer = make_trainer(model, PackCollator(as_arguments=True))
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = torch.cat([flat(model), torch.tensor(logged)])
    assert_error_at_most_twice(found, expected, reference, "weights and losses")


@pytest.mark.usefixtures("in_float64")
def test_evaluation_equals_that_of_separate_documents(make_trainer, make_llama):
    model = make_llama()
    lctrain.patch_model(model)
    trainer = make_trainer(
        model, PackCollator(as_arguments=True), per_device_eval_batch_size=len(DOCUMENTS)
    )
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        total, count = separate_losses(make_llama().double(), DOCUMENTS)
    assert found == near(float(total / count))


@pytest.mark.usefixtures("in_float64")
def test_a_packed_batch_says_what_to_do_and_that_works(make_trainer, make_llama):
    model = make_llama()
    lctrain.patch_model(model)
    with pytest.raises(TypeError, match=r"got a PackedBatch.*PackCollator\(as_arguments=True\)"):
        make_trainer(model, PackCollator()).train()
    batch = lctrain.PackedBatch.from_documents([d["input_ids"] for d in DOCUMENTS])
    packed = copy.deepcopy(model)(**batch.arguments()).loss
    total, count = separate_losses(model, DOCUMENTS)
    assert_equal_in_float64(packed, total / count)
