"""Tests IsolationCheck: it accepts patched models, stops leaking ones, and alters no training."""

import pytest
import torch
import transformers

from lctrain.batch import PackedBatch
from lctrain.callbacks import IsolationCheck, IsolationError
from lctrain.callbacks.isolation import check_isolation
from lctrain.config import OptimConfig
from lctrain.models import patch_model
from lctrain.module import LongContextModule
from tests.training import loader, make_batch, make_trainer

PACKS = [make_batch([9, 30, 21], 0), make_batch([40, 20], 1)]


def leak(model):
    """Lets every token see its predecessor in the pack, as a convolution or a token shift does."""

    def shift(module, arguments, hidden):
        return hidden + 0.1 * hidden.roll(1, dims=1)

    model.model.embed_tokens.register_forward_hook(shift)
    return model


@pytest.fixture
def patched(make_llama):
    model = make_llama(attention_dropout=0.5)
    patch_model(model)
    return model


@pytest.mark.parametrize("largest", [2**28, 100], ids=["logits", "hidden-states"])
def test_patched_model_passes_and_a_leak_is_stopped(patched, monkeypatch, largest):
    monkeypatch.setattr("lctrain.callbacks.isolation.LARGEST_LOGITS", largest)
    for batch in PACKS:
        check_isolation(patched, batch)
    cause = r"changing document 1 \(document-0-1\).*the first in 2 \(document-0-2\) at token 39"
    with pytest.raises(IsolationError, match=cause):
        check_isolation(leak(patched), PACKS[0])


def test_error_says_what_to_do(patched):
    with pytest.raises(IsolationError, match=r"patch_model\(model\) \(attention=flash\)"):
        check_isolation(leak(patched), PACKS[1])


def test_a_model_that_mixes_packed_documents_is_stopped(make_llama):
    """Without boundaries, transformers' attention sees the whole pack."""
    model = make_llama()

    class Unaware(torch.nn.Module):
        config = model.config

        def forward(self, input_ids, **kwargs):
            return model(input_ids=input_ids)

    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(Unaware(), PACKS[0])


def test_one_document_is_checked_as_two_halves(patched):
    check_isolation(patched, make_batch([50], 3))
    check_isolation(patched, make_batch([1], 3))
    with pytest.raises(IsolationError, match=r"document-3-0 \(2nd half\)\) at token 25"):
        check_isolation(leak(patched), make_batch([50], 3))


@pytest.mark.parametrize("lengths", [(20, 0, 30), (0, 50), (50, 0), (0, 0, 25, 25)], ids=str)
def test_empty_documents_are_never_the_one_that_changes(patched, lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    batch = PackedBatch.from_packed(torch.arange(50) + 3, ends)
    check_isolation(patched, batch)
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(leak(patched), batch)


def test_a_model_that_ignores_its_input_proves_nothing(patched):
    torch.nn.init.zeros_(patched.model.embed_tokens.weight)
    with pytest.raises(IsolationError, match="did not change its own outputs"):
        check_isolation(patched, PACKS[0])


def test_weights_that_are_not_finite_are_no_leak(patched):
    torch.nn.init.constant_(patched.lm_head.weight, float("nan"))
    with pytest.raises(IsolationError, match=r"or its weights are all zero or not finite"):
        check_isolation(patched, PACKS[0])


def test_outputs_that_are_never_numbers_are_no_leak(patched):
    with torch.no_grad():
        patched.lm_head.weight[3] = float("nan")
    check_isolation(patched, PACKS[0])


def test_nothing_is_disturbed(patched):
    model = patched
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    check_isolation(model, PACKS[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_is_the_same_with_and_without(tmp_path, make_llama):
    losses = []
    for callbacks in ([], [IsolationCheck()]):
        module = LongContextModule(make_llama(attention_dropout=0.1), OptimConfig())
        make_trainer(tmp_path, callbacks).fit(module, loader(PACKS))
        losses.append(float(module.last_loss))
    assert losses[0] == losses[1]


def test_the_run_stops_before_its_first_step(tmp_path, make_llama):
    trainer = make_trainer(tmp_path, [IsolationCheck()])
    module = LongContextModule(leak(make_llama()), OptimConfig())
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(IsolationError):
        trainer.fit(module, loader(PACKS))
    assert trainer.global_step == 0
    for old, new in zip(before, module.parameters(), strict=True):
        assert torch.equal(old, new)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("lengths", [(20, 60, 25), (20, 24, 30), (60, 9, 70)], ids=str)
@pytest.mark.parametrize(("rope", "window"), [(LONGROPE, 128), (DYNAMIC, 32)], ids=str)
def test_a_neighbour_s_length_is_varied(make_llama, rope, window, lengths):
    """transformers separates these documents, but takes RoPE frequencies from the longest one."""
    model = make_llama(head_dim=8, rope_parameters=rope, max_position_embeddings=window)
    with pytest.raises(IsolationError, match="a neighbour's length changes a document"):
        check_isolation(model, make_batch(lengths, 0))


def test_lengths_that_do_not_matter(make_llama):
    check_isolation(make_llama(), make_batch([20, 60, 25], 0))


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    patch_model(model)
    return model


def round_by_company(model, size):
    """Scales the experts' output by 1 + `size` * (tokens of expert 0 modulo 4)."""

    def scale(module, arguments, output):
        _, chosen, _ = arguments
        return output * (1 + size * int((chosen == 0).sum() % 4))

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_hook(scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_of_experts_is_no_leak(mixture, dtype, monkeypatch):
    mixture.to(dtype)
    round_by_company(mixture, torch.finfo(dtype).eps)
    for batch in PACKS:
        check_isolation(mixture, batch)
    monkeypatch.setattr("lctrain.callbacks.routed.find_routed", lambda model: [])
    with pytest.raises(IsolationError):  # so there was something to tell from a leak
        check_isolation(mixture, PACKS[0])


def test_autocast_rounds_experts_whose_outputs_are_float32(mixture):
    round_by_company(mixture, torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", torch.bfloat16):
        check_isolation(mixture, PACKS[0])
    with pytest.raises(IsolationError):
        check_isolation(mixture, PACKS[0])


@pytest.mark.parametrize("size", [0.1, 1e-6])
def test_a_leak_before_experts_is_stopped_though_it_is_as_small_as_rounding(mixture, size):
    round_by_company(mixture, torch.finfo(torch.float32).eps)

    def shift(module, arguments, hidden):
        return hidden + size * hidden.roll(1, dims=1)

    mixture.model.embed_tokens.register_forward_hook(shift)
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(mixture, PACKS[0])


def test_a_leak_inside_experts_is_stopped(mixture):
    """Simulates experts of limited capacity, which drop late tokens."""

    def drop(module, arguments, output):
        _, chosen, _ = arguments
        late = (chosen == 0).any(-1).cumsum(0) > 5
        return torch.where((late & (chosen == 0).any(-1))[:, None], 0.99 * output, output)

    mixture.model.layers[0].mlp.experts.register_forward_hook(drop)
    with pytest.raises(IsolationError):
        check_isolation(mixture, PACKS[0])


def test_a_leak_after_experts_is_stopped(mixture):
    mixture.model.norm.register_forward_hook(lambda m, a, hidden: hidden + 1e-6 * hidden.roll(1, 1))
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(mixture, PACKS[0])


@pytest.fixture
def mixture_of_heads():
    """A JetMoe, whose attention layers route queries through experts that no module calls."""
    torch.manual_seed(0)
    config = transformers.JetMoeConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=8,
        num_local_experts=8,
        num_experts_per_tok=2,
    )
    model = transformers.JetMoeForCausalLM(config)
    patch_model(model)
    for module in model.modules():
        if type(module).__name__ == "JetMoeParallelExperts":
            module.register_forward_hook(
                lambda m, arguments, output: output * (1 + 2**-23 * (int(arguments[1][0]) % 4))
            )
    return model


def test_rounding_of_routed_attention_heads_is_no_leak(mixture_of_heads, monkeypatch):
    for batch in PACKS:
        check_isolation(mixture_of_heads, batch)
    methods = [set(vars(module)) & {"map", "reduce"} for module in mixture_of_heads.modules()]
    assert not any(methods)  # nothing is left behind
    monkeypatch.setattr("lctrain.callbacks.routed._has_forward", lambda block: True)
    with pytest.raises(IsolationError):  # so there was something to tell from a leak
        check_isolation(mixture_of_heads, PACKS[0])


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_a_leak_beside_routed_attention_heads_is_stopped(mixture_of_heads, inside):
    if inside:
        heads = mixture_of_heads.model.layers[1].self_attention.experts
        whole = heads.reduce
        heads.reduce = lambda *args: 0.99 * whole(*args) + 0.01 * whole(*args).roll(1, dims=1)
    else:  # as small as rounding
        mixture_of_heads.model.embed_tokens.register_forward_hook(
            lambda m, a, hidden: hidden + 1e-6 * hidden.roll(1, dims=1)
        )
    with pytest.raises(IsolationError, match="documents of a pack mix"):
        check_isolation(mixture_of_heads, PACKS[0])


def test_of_a_large_mixture_fewer_tokens_are_checked(mixture, monkeypatch):
    monkeypatch.setattr("lctrain.callbacks.isolation.LARGEST_RECORD", 2 * 32 * 40)
    seen = []
    mixture.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    check_isolation(mixture, make_batch([9, 30, 21], 0))
    assert set(seen) == {40}
    leak(mixture)
    with pytest.raises(IsolationError):
        check_isolation(mixture, make_batch([60], 0))


def test_a_bar_shows_every_pass(patched, monkeypatch, capfd):
    """The progress bar appears after a delay, which this test sets to zero."""
    monkeypatch.setattr("lctrain.callbacks.passes.BAR_DELAY_S", 0)
    check_isolation(patched, PACKS[0])
    assert "Isolation check" not in capfd.readouterr().err
    check_isolation(patched, PACKS[0], progress=True)
    assert "Isolation check: " in capfd.readouterr().err
