import copy
import os
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import lctrain
from lctrain.batch import PackedBatch
from lctrain.loss import causal_lm, causal_lm_loss, find_output_head, token_losses
from tests.float64 import built_in_float64, float64_throughout
from tests.loss.conftest import ARCHITECTURES, build_architecture
from tests.numerics import (
    assert_equal_in_float64,
    assert_errors_at_most_twice,
    assert_far_apart,
    assert_sum_error_at_most_twice,
)


def full_logits_losses(model, batch, reduction="none") -> torch.Tensor:
    logits = model(**batch.model_kwargs()).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, batch.labels[0], reduction=reduction)


def full_logits_loss(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    return full_logits_losses(model, batch, "sum")


def loss_and_grads(function, model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss or losses, and the gradients of their sum in all parameters."""
    model.zero_grad()
    loss = function(model, batch)
    loss.sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_like_plain_pytorch(ours, plain, exact) -> None:
    """Compares results of loss_and_grads; both references have a loss per token."""
    assert ours[1].keys() == plain[1].keys() == exact[1].keys() != set()
    assert_sum_error_at_most_twice(ours[0], plain[0], exact[0], "loss")
    assert_errors_at_most_twice(ours[1], plain[1], exact[1])


def assert_same_bits(one, other) -> None:
    """Asserts that two results of loss_and_grads are equal in every bit."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


def our_loss(model, batch) -> torch.Tensor:
    return causal_lm_loss(model, batch)[0]


@pytest.fixture
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_full_logits_with_every_gradient(architecture, make_model, one_document) -> None:
    model = make_model(architecture)
    ours = loss_and_grads(our_loss, model, one_document)
    plain = loss_and_grads(full_logits_losses, model, one_document)
    with float64_throughout():
        exact = loss_and_grads(full_logits_losses, copy.deepcopy(model).double(), one_document)
    assert ours[0].dtype == torch.float32
    assert_like_plain_pytorch(ours, plain, exact)


def test_counts_valid_tokens(make_model) -> None:
    batch = PackedBatch.from_documents([[5, 6, 7]])
    _, count = causal_lm_loss(make_model(), batch)
    assert count.dtype == torch.int64
    assert count.item() == 2 == batch.num_valid_tokens


def test_batch_without_targets_has_loss_zero_and_zero_gradients(make_model, one_document) -> None:
    model = make_model()
    loss, count = causal_lm_loss(model, one_document.without_targets())
    loss.backward()
    assert (loss.item(), count.item()) == (0.0, 0)
    assert all(not p.grad.any() for p in model.parameters())


@pytest.mark.usefixtures("in_float64")
def test_packed_documents_equal_separate_documents(make_model) -> None:
    documents = [torch.randint(97, (length,)) for length in (20, 2, 33)]
    model = make_model().double()
    with lctrain.patch_model(model, attention="flash"):
        packed = loss_and_grads(our_loss, model, PackedBatch.from_documents(documents))
        rows = [
            loss_and_grads(our_loss, model, PackedBatch.from_documents([document]))
            for document in documents
        ]
    assert_equal_in_float64(packed[0], sum(loss for loss, _ in rows))
    for name, value in packed[1].items():
        assert_equal_in_float64(value, sum(grads[name] for _, grads in rows), name)


@pytest.mark.usefixtures("no_warning")
@pytest.mark.parametrize("tied", ["llama", "tied"])
def test_first_loss_under_autocast_reaches_every_parameter(tied, make_model, one_document) -> None:
    """The head's check casts weights without a gradient; autocast must not cache these casts."""
    model = make_model(tied)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = causal_lm_loss(model, one_document)
    loss.backward()
    assert loss.dtype == torch.float32
    ours = loss.detach(), {name: p.grad for name, p in model.named_parameters()}
    assert all(grad is not None for grad in ours[1].values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = loss_and_grads(full_logits_losses, copy.deepcopy(model), one_document)
    with float64_throughout():
        exact = loss_and_grads(full_logits_losses, copy.deepcopy(model).double(), one_document)
    assert_like_plain_pytorch(ours, plain, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_gradients(
    use_reentrant, make_model, one_document
) -> None:
    model = make_model()
    expected = loss_and_grads(our_loss, model, one_document)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_bits(loss_and_grads(our_loss, model, one_document), expected)


def test_the_head_is_checked_without_drawing_random_numbers(make_model, one_document) -> None:
    torch.manual_seed(1)
    model = make_model("gpt2", resid_pdrop=0.1)
    state = torch.get_rng_state()
    find_output_head(model, one_document.model_kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_the_probe_is_built_once_for_a_model(make_model, one_document, monkeypatch) -> None:
    """Building the probe copies to the device, which would synchronise in every step."""
    built = []
    probe = causal_lm.probe
    monkeypatch.setattr(causal_lm, "probe", lambda *args: built.append(args) or probe(*args))
    model = make_model()
    for _ in range(3):
        causal_lm_loss(model, one_document)
    assert len(built) == 1


def test_modules_that_were_in_evaluation_mode_stay_there(make_model, one_document) -> None:
    model = make_model()
    model.model.layers[0].eval()
    causal_lm_loss(model, one_document)
    assert model.training
    assert not model.model.layers[0].training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].training


class ScaledHead(nn.Linear):
    """An output embedding whose forward does more than multiply by its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden)


def halve_input(module, args):
    return (args[0] / 2,)


def shift_logits(module, args, output):
    output.logits = output.logits + torch.arange(output.logits.shape[-1])
    return output


def cap_logits(module, args, output):
    output.logits = 50 * torch.tanh(output.logits / 50)
    return output


def replace_head(model) -> None:
    model.lm_head = ScaledHead(32, 97, bias=False)


ALTERATIONS = {
    "subclass": (replace_head, "is a ScaledHead"),
    "head-hook": (lambda m: m.lm_head.register_forward_pre_hook(halve_input), "has hooks"),
    "logits": (lambda m: m.register_forward_hook(shift_logits), "changes the logits"),
    "softcap": (lambda m: m.register_forward_hook(cap_logits), "changes the logits"),
    "config": (lambda m: setattr(m.config, "logit_scale", 2.0), "changes the logits"),
}


@pytest.mark.parametrize(("alter", "reason"), ALTERATIONS.values(), ids=ALTERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_heads_fall_back_to_full_logits_with_one_warning(
    alter, reason, dtype, make_model, one_document
) -> None:
    model = make_model()
    alter(model)
    model.to(dtype)
    with pytest.warns(UserWarning, match=reason):
        ours = loss_and_grads(our_loss, model, one_document)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        causal_lm_loss(model, one_document)
    assert_same_bits(loss_and_grads(full_logits_loss, model, one_document), ours)


def test_hidden_states_scaled_before_the_head_fall_back(make_model, one_document) -> None:
    model = make_model()
    forward = model.forward

    def scaled_forward(**kwargs):
        hidden = model.model(**kwargs).last_hidden_state
        return {"logits": model.lm_head(hidden / 3)}

    model.forward = scaled_forward
    with pytest.warns(UserWarning, match="changes the hidden states"):
        causal_lm_loss(model, one_document)
    model.forward = forward


def test_base_model_that_differs_when_called_alone_falls_back(make_model, one_document) -> None:
    model = make_model()
    forward = model.forward

    def embedding_forward(input_ids, **kwargs):
        return forward(inputs_embeds=2 * model.model.embed_tokens(input_ids), **kwargs)

    model.forward = embedding_forward
    with pytest.warns(UserWarning, match="other hidden states when called alone"):
        causal_lm_loss(model, one_document)


@pytest.mark.usefixtures("in_float64")
def test_a_new_output_embedding_is_checked_again(make_model, one_document) -> None:
    model = make_model()
    causal_lm_loss(model, one_document)
    model.resize_token_embeddings(120)
    before = causal_lm_loss(model, one_document)[0]
    assert_equal_in_float64(before, full_logits_loss(model, one_document))
    replace_head(model)
    with pytest.warns(UserWarning, match="is a ScaledHead"):
        after = causal_lm_loss(model, one_document)[0]
    assert_equal_in_float64(after, full_logits_loss(model, one_document))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_model_is_verified_anew(make_model, one_document, copied) -> None:
    """The copy's loss uses the copy's weights."""
    model = make_model()
    before = causal_lm_loss(model, one_document)[0]
    other = copied(model)
    nn.init.normal_(other.lm_head.weight)
    after = causal_lm_loss(other, one_document)[0]
    assert_far_apart(after, before)
    assert list(other.state_dict()) == list(model.state_dict())


def test_zero_initialised_head_is_verified_too(make_model, one_document) -> None:
    """With zero weights every cap and scale gives the same logits, until the head is trained."""
    model = make_model()
    nn.init.zeros_(model.lm_head.weight)
    model.register_forward_hook(cap_logits)
    with pytest.warns(UserWarning, match="changes the logits"):
        causal_lm_loss(model, one_document)


@pytest.mark.usefixtures("no_warning")
def test_compiled_model_runs_its_decoder_compiled(make_model, one_document) -> None:
    model = make_model()
    calls = []

    def backend(graph, inputs):
        calls.append(len(inputs))
        return graph.forward

    plain = full_logits_losses(model, one_document)
    with float64_throughout():
        exact = full_logits_losses(copy.deepcopy(model).double(), one_document)
    causal_lm_loss(model, one_document)
    compiled = torch.compile(model, backend=backend)
    assert not calls
    loss, _ = causal_lm_loss(compiled, one_document)
    assert calls
    assert_sum_error_at_most_twice(loss, plain, exact)


def test_model_compiled_in_place_gets_a_warning(make_model, one_document) -> None:
    model = make_model()
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"base_model\.compile\(\)"):
        causal_lm_loss(model, one_document)


def test_router_loss_that_is_not_added_gets_a_warning(make_model, one_document) -> None:
    model = make_model("mixtral-experts")
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match="router's auxiliary loss"):
        causal_lm_loss(model, one_document)


def test_distributed_wrapper_is_an_error(make_model, one_document, tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(make_model())
        with pytest.raises(
            ValueError, match=r"got a DistributedDataParallel wrapper.*model\.module"
        ):
            causal_lm_loss(model, one_document)
    finally:
        torch.distributed.destroy_process_group()


class LossModule(nn.Module):
    """A module that computes the loss in its forward, as DDP needs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return causal_lm_loss(self.model, batch)[0]


@built_in_float64()
def _ddp_gradients(rank: int, folder: str, batch: PackedBatch) -> None:
    model = build_architecture("tied").train()
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=1)
    wrapped = nn.parallel.DistributedDataParallel(LossModule(model))
    for _ in range(2):
        model.zero_grad()
        wrapped(batch).backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/grads")
    # Without destructors: freeing DDP's reducer while gloo's thread waits for the interpreter lock
    # deadlocks (torch 2.13).
    os._exit(0)


@pytest.mark.usefixtures("in_float64")
def test_under_ddp_the_gradients_are_those_of_the_plain_model(one_document, tmp_path) -> None:
    _, expected = loss_and_grads(our_loss, build_architecture("tied").train(), one_document)
    torch.multiprocessing.spawn(_ddp_gradients, (str(tmp_path), one_document), nprocs=1)
    assert_equal_in_float64(torch.load(tmp_path / "grads"), expected)


@pytest.mark.parametrize("architecture", ["llama", "phi-head-with-bias", "gemma2-softcap"])
@pytest.mark.usefixtures("in_float64")
def test_token_losses_of_chosen_positions(architecture, make_model, one_document) -> None:
    model = make_model(architecture).eval()
    positions = torch.tensor([0, 7, 28])
    targets = torch.tensor([3, 96, 0])
    logits = model(**one_document.model_kwargs()).logits[0, positions]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    losses = token_losses(model, one_document.model_kwargs(), positions, targets)
    assert_equal_in_float64(losses, expected)
    replaced = token_losses(
        model, {"input_ids": one_document.input_ids, "use_cache": False}, positions, targets
    )
    assert_equal_in_float64(replaced, expected)


@pytest.mark.usefixtures("in_float64")
def test_token_losses_in_the_fallback(make_model, one_document) -> None:
    model = make_model().eval()
    replace_head(model)
    positions = torch.tensor([4, 2])
    targets = torch.tensor([3, 96])
    with pytest.warns(UserWarning, match="is a ScaledHead"):
        losses = token_losses(model, one_document.model_kwargs(), positions, targets)
    logits = model(**one_document.model_kwargs()).logits[0, positions]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    assert_equal_in_float64(losses, expected)


@pytest.mark.gpu
def test_no_synchronisation_after_the_first_batch(make_model, one_document) -> None:
    model = make_model().to("cuda", torch.bfloat16)
    batch = one_document.to("cuda")
    with lctrain.patch_model(model, attention="flash"):
        loss_and_grads(our_loss, model, batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_grads(our_loss, model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
