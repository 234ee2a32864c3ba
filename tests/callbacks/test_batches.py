"""Tests BatchView, and the callbacks on a user's own modules and batches."""

import pytest
import torch
from lightning.pytorch import LightningModule

from lctrain.callbacks import (
    IsolationCheck,
    IsolationError,
    LengthPerplexity,
    NonFiniteLossError,
    NonFiniteLossGuard,
    PatchAttention,
    StepCheckpoint,
    ThroughputMonitor,
    TokenExactLoss,
    TokenProgressBar,
)
from lctrain.callbacks.batches import view_batch
from tests.callbacks.own_module import OwnModule
from tests.numerics import near
from tests.training import loader, make_batch, make_trainer

LENGTHS = (5, 1, 8)
PACK = make_batch(LENGTHS, 3)
TOKENS = PACK.input_ids
PADDED = torch.tensor([[1] * 5 + [0] * 3, [1] * 8])
PARTS = {
    "pack": PACK,
    "boundaries": {"input_ids": TOKENS, "cu_seq_lens_q": PACK.cu_seqlens},
    "positions": {"input_ids": TOKENS, "position_ids": PACK.position_ids},
    "one-dimension": {"input_ids": TOKENS[0], "cu_seq_lens_q": PACK.cu_seqlens},
}


@pytest.mark.parametrize("name", PARTS)
def test_documents_of_a_pack(name):
    view = view_batch(PARTS[name])
    for seen in (view, view.without_tokens()):
        assert seen.lengths == LENGTHS
        assert seen.num_tokens == sum(LENGTHS)
        assert seen.rows == 1
    assert view.says_where_documents_end
    assert len(view.document_names()) == 3


def test_documents_of_rows():
    tokens = torch.ones(2, 8, dtype=torch.int64)
    assert view_batch({"input_ids": tokens}).lengths == (8, 8)
    assert view_batch({"input_ids": tokens, "attention_mask": PADDED}).lengths == (5, 8)
    packed_rows = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], list(range(8))])
    both = {"input_ids": tokens, "attention_mask": PADDED, "position_ids": packed_rows}
    assert view_batch(both).lengths == (3, 2, 8)
    assert view_batch(both).without_tokens().lengths == (3, 2, 8)


@pytest.mark.usefixtures("in_float64")
def test_valid_tokens_are_those_of_the_models_own_loss(make_llama):
    """BatchView counts the labels that transformers' loss counts after its shift."""
    model = make_llama()
    labels = TOKENS.clone()
    labels[0, [0, 4, 9]] = -100
    batch = {"input_ids": TOKENS, "labels": labels}
    mean = model(**batch).loss
    logits = model(input_ids=TOKENS).logits[0, :-1]
    total = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    count = int(view_batch(batch).num_valid_tokens())
    assert float(total / count) == near(float(mean))
    shifted = {"input_ids": TOKENS, "shift_labels": PACK.labels}
    assert int(view_batch(shifted).num_valid_tokens()) == PACK.num_valid_tokens
    assert view_batch(PACK).num_valid_tokens() == PACK.num_valid_tokens


@pytest.mark.parametrize(
    ("batch", "read", "message"),
    [
        ((TOKENS, TOKENS), None, r"batch must be a PackedBatch.*got tuple. Pass the callback read"),
        ({"tokens": TOKENS}, None, r"got dict with 'tokens'"),
        ((TOKENS,), lambda batch: batch[0], r"read_batch must return a PackedBatch.*got Tensor"),
    ],
)
def test_what_cannot_be_read_is_an_error(batch, read, message):
    with pytest.raises(ValueError, match=message):
        view_batch(batch, read)


def test_a_batch_without_labels_has_no_count():
    with pytest.raises(ValueError, match=r"must hold .labels.*Return the count from training_step"):
        view_batch({"input_ids": TOKENS}).num_valid_tokens()


class Dicts(OwnModule):
    """A module whose batches are mappings, and whose model computes its own mean loss."""

    def loss_of(self, batch):
        return self.model(**batch, use_cache=False).loss


class Tuples(OwnModule):
    def loss_of(self, batch):
        return self.model(**read(batch), use_cache=False).loss


def read(batch):
    tokens, labels, ends = batch
    length = int(ends.diff().max())
    return {
        "input_ids": tokens,
        "labels": labels,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
    }


def as_tuple(pack):
    labels = pack.input_ids.clone()
    labels[0, pack.cu_seqlens[:-1].long()] = -100
    return pack.input_ids, labels, pack.cu_seqlens


class Manual(OwnModule):
    """A module with manual optimization, which takes two optimizer steps per batch."""

    def __init__(self, model):
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = self.loss_of(batch)["loss"]
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss}


PACKS = [make_batch([12, 5], 0), make_batch([30, 7], 1), make_batch([7, 8, 9], 2)]
FORMS = {
    "packs": (OwnModule, PACKS, None),
    "mappings": (Dicts, [read(as_tuple(pack)) for pack in PACKS], None),
    "tuples": (Tuples, [as_tuple(pack) for pack in PACKS], read),
    "manual": (Manual, PACKS, None),
}


def plain_loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.mark.parametrize("reverse", [False, True], ids=["order", "reversed"])
@pytest.mark.parametrize("form", FORMS)
def test_all_callbacks_together(tmp_path, make_llama, form, reverse):
    kind, batches, reader = FORMS[form]
    monitor = ThroughputMonitor(64, read_batch=reader)
    exact = TokenExactLoss("sum" if kind in (OwnModule, Manual) else "mean", read_batch=reader)
    callbacks = [
        PatchAttention(),
        IsolationCheck(read_batch=reader),
        monitor,
        NonFiniteLossGuard(read_batch=reader),
        exact,
        LengthPerplexity([8], every_n_steps=2, held_out=[list(range(3, 40))]),
        StepCheckpoint(tmp_path / "c", every_n_steps=2),
        TokenProgressBar(),
    ]
    module = kind(make_llama())
    trainer = make_trainer(
        tmp_path,
        callbacks[:: -1 if reverse else 1],
        enable_checkpointing=True,
        enable_progress_bar=True,
    )
    trainer.fit(module, plain_loader(batches))
    assert monitor.total.tokens == sum(pack.num_tokens for pack in PACKS)
    assert monitor.total.fill == monitor.total.tokens / (3 * 64)
    assert monitor.total.flops > 0
    assert 4.0 < float(exact.last_loss) < 5.0  # about the logarithm of 97
    assert (tmp_path / "c" / "last.ckpt").exists()
    assert float(trainer.callback_metrics["throughput/tokens"]) == monitor.total.tokens


@pytest.mark.parametrize("form", ["mappings", "tuples"])
def test_isolation_is_checked_on_foreign_batches(tmp_path, make_llama, form):
    kind, batches, reader = FORMS[form]
    model = make_llama()

    def shift(module, arguments, hidden):
        return hidden + 0.1 * hidden.roll(1, dims=1)

    model.model.embed_tokens.register_forward_hook(shift)
    trainer = make_trainer(tmp_path, [PatchAttention(), IsolationCheck(read_batch=reader)])
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        trainer.fit(kind(model), plain_loader(batches))
    assert trainer.global_step == 0


def test_isolation_needs_boundaries(tmp_path, make_llama):
    batches = [{"input_ids": TOKENS, "labels": TOKENS}]
    trainer = make_trainer(tmp_path, [IsolationCheck()])
    with pytest.raises(ValueError, match=r"must say where documents end.*Use lctrain.data.PackCol"):
        trainer.fit(Dicts(make_llama()), plain_loader(batches))
    assert trainer.global_step == 0


def test_rows_of_one_document_have_nothing_to_mix(tmp_path, make_llama):
    tokens = torch.arange(3, 19).view(2, 8)
    batches = [{"input_ids": tokens, "labels": tokens, "attention_mask": PADDED}]
    make_trainer(tmp_path, [IsolationCheck()]).fit(Dicts(make_llama()), plain_loader(batches))


class Pair(OwnModule):
    def __init__(self, model, other):
        super().__init__(model)
        self.other = other


@pytest.mark.parametrize("callback", [ThroughputMonitor, IsolationCheck])
def test_two_trained_models_need_a_name(tmp_path, make_llama, callback):
    pair = Pair(make_llama(), make_llama(hidden_size=16))
    with pytest.raises(ValueError, match=rf"got 2 in Pair.*{callback.__name__}\(model='model'\)"):
        make_trainer(tmp_path, [PatchAttention(), callback()]).fit(pair, loader(PACKS))
    named = callback(model="other")
    make_trainer(tmp_path, [PatchAttention(), named], max_steps=1).fit(pair, loader(PACKS))
    pair.other.requires_grad_(False)
    make_trainer(tmp_path, [PatchAttention(), callback()], max_steps=1).fit(pair, loader(PACKS))


def test_a_module_without_a_model(tmp_path):
    class Bare(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(torch.ones(1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(ValueError, match="ThroughputMonitor needs a transformers model, got none"):
        make_trainer(tmp_path, [ThroughputMonitor()]).fit(Bare(), loader(PACKS))


def test_length_perplexity_says_what_it_needs(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, [LengthPerplexity([8], every_n_steps=1)])
    with pytest.raises(ValueError, match=r"got no data module that has them\. Pass held_out="):
        trainer.fit(OwnModule(make_llama()), loader(PACKS))
    text = LengthPerplexity([8], every_n_steps=1, held_out=["some text"])
    with pytest.raises(TypeError, match=r"held_out\[0\] must hold token ids, got text \('some"):
        make_trainer(tmp_path, [text]).fit(OwnModule(make_llama()), loader(PACKS))


@pytest.mark.parametrize("form", FORMS)
def test_a_loss_that_is_not_finite_names_documents(tmp_path, make_llama, form):
    kind, batches, reader = FORMS[form]
    model = make_llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    trainer = make_trainer(tmp_path, [PatchAttention(), NonFiniteLossGuard(read_batch=reader)])
    names = "document-0-0, document-0-1" if kind in (OwnModule, Manual) else "number 0, number 1"
    with pytest.raises(NonFiniteLossError, match=f"nan in micro-batch 0, documents: {names}"):
        trainer.fit(kind(model), plain_loader(batches))


def test_the_guard_says_what_it_needs(tmp_path, make_llama):
    class Silent(Manual):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"needs the loss of every batch.*Return it"):
        make_trainer(tmp_path, [NonFiniteLossGuard()]).fit(Silent(make_llama()), loader(PACKS))
