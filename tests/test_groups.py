"""Tests packs whose completions share a prompt: equal to separate documents, gradients included."""

import dataclasses

import pytest
import torch
from transformers import LlamaForSequenceClassification

import lctrain
from lctrain import PackedBatch
from lctrain.callbacks import IsolationCheck
from lctrain.config import MemoryConfig
from lctrain.loss import causal_lm_loss
from lctrain.memory.policy import apply_config
from lctrain.models.differential import to_differential
from lctrain.module import LongContextModule
from tests.models.families import make_model
from tests.numerics import (
    assert_equal_in_float64,
    assert_errors_at_most_twice,
    assert_far_apart,
)
from tests.training import loader, make_trainer

GROUPS = [
    ([5, 6, 7, 8, 9, 10, 11], [[20, 21, 22], [30], [40, 41, 42, 43, 44]]),
    ([12], [[50, 51], [60, 61, 62]]),
    ([13, 14, 15], [[70, 71]]),
]


def separate(groups):
    """Packs every prompt with each of its completions as a document of its own."""
    pairs = [(prompt, completion) for prompt, completions in groups for completion in completions]
    return PackedBatch.from_documents(
        [[*prompt, *completion] for prompt, completion in pairs],
        labels=[[-100] * len(prompt) + list(completion) for prompt, completion in pairs],
    )


def completion_logits(model, batch):
    """Returns the logits that predict the tokens of the completions, in the order of the pack."""
    logits = model(**batch.model_kwargs()).logits[0]
    return logits[batch.labels[0] != -100]


def results(model, batch):
    """Returns the logits of the completions and the gradients of their loss."""
    model.zero_grad()
    logits = completion_logits(model, batch)
    loss, tokens = causal_lm_loss(model, batch)
    loss.backward()
    return [logits, loss, *(parameter.grad.clone() for parameter in model.parameters())], tokens


def test_a_group_is_its_prefix_and_its_suffixes():
    batch = PackedBatch.from_groups(GROUPS)
    assert batch.lengths == (6, 4, 2, 6, 3, 4, 2, 3)
    assert batch.groups.parents == (-1, 0, 0, 0, -1, -1, -1, 6)
    assert batch.groups.members == ((1, 2, 3), (4, 5), (7,))
    assert batch.position_ids[0].tolist() == [
        *range(6), *range(6, 10), *range(6, 8), *range(6, 12), *range(3), *range(4), *range(2),
        *range(2, 5),
    ]  # fmt: skip
    assert batch.input_ids[0, 6:12].tolist() == [11, 20, 21, 22, 11, 30]
    assert batch.labels[0, :12].tolist() == [*[-100] * 6, 20, 21, 22, -100, 30, -100]
    assert batch.num_valid_tokens == separate(GROUPS).num_valid_tokens == 16
    assert batch.groups.longest == 12
    moved = batch.to("cpu")
    assert torch.equal(moved.groups.suffix_tokens, batch.groups.suffix_tokens)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_gradients_equal_those_of_separate_documents(make_llama, checkpointing):
    model = make_llama().double()
    lctrain.patch_model(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    shared, tokens = results(model, PackedBatch.from_groups(GROUPS))
    alone, expected_tokens = results(model, separate(GROUPS))
    assert tokens == expected_tokens
    assert_equal_in_float64(shared, alone)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("keep_attention", [0, 2])
def test_recomputed_layers_give_the_same_gradients(make_llama, keep_attention):
    """Dropout draws the same masks again; a layer's two attention calls are both kept."""
    found = []
    for config in (None, MemoryConfig(name="checkpoint", keep_attention=keep_attention)):
        model = make_llama(attention_dropout=0.3).double().train()
        lctrain.patch_model(model)
        if config is not None:
            apply_config(model, config, 64, "true")
        batch = PackedBatch.from_groups(GROUPS)
        causal_lm_loss(model, batch)  # the first call for a model verifies its head
        torch.manual_seed(1)
        found.append(results(model, batch)[0])
    assert_equal_in_float64(found[1], found[0])


@pytest.mark.usefixtures("in_float64")
def test_groups_of_one_token_prompts_and_single_completions(make_llama):
    model = make_llama().double()
    lctrain.patch_model(model)
    for groups in ([([5], [[6, 7], [8]])], [([5, 6, 7], [[8]])]):
        shared, _ = results(model, PackedBatch.from_groups(groups))
        alone, _ = results(model, separate(groups))
        assert_equal_in_float64(shared, alone)


@pytest.mark.usefixtures("in_float64")
def test_a_window_that_covers_the_group_changes_nothing(make_llama):
    model = make_llama().double()
    lctrain.patch_model(model, sliding_window=12)
    shared, _ = results(model, PackedBatch.from_groups(GROUPS))
    alone, _ = results(model, separate(GROUPS))
    assert_equal_in_float64(shared, alone)


@pytest.mark.usefixtures("in_float64")
def test_sinks_count_once_for_a_suffix_and_its_prefix():
    model = make_model("gpt_oss", vocab_size=97, sliding_window=12).double()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.uniform_(1.0, 2.0)
    lctrain.patch_model(model)
    logits = completion_logits(model, PackedBatch.from_groups(GROUPS))
    expected = completion_logits(model, separate(GROUPS))
    assert_equal_in_float64(logits, expected)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
    assert_far_apart(completion_logits(model, separate(GROUPS)), expected)


def test_nan_in_one_suffix_reaches_neither_its_siblings_nor_the_prefix(make_llama):
    model = make_llama()
    lctrain.patch_model(model)
    batch = PackedBatch.from_groups(GROUPS[:1])
    embeds = model.get_input_embeddings()(batch.input_ids).detach()
    embeds[0, 6] = float("nan")  # in the first suffix
    arguments = batch.model_kwargs() | {"input_ids": None, "inputs_embeds": embeds}
    hidden = model.model(**arguments).last_hidden_state[0]
    assert hidden[6:10].isnan().all()
    assert not hidden[:6].isnan().any()
    assert not hidden[10:].isnan().any()


@pytest.mark.usefixtures("in_float64")
def test_a_split_of_a_group_over_packs_changes_no_loss(make_llama):
    model = make_llama().double()
    lctrain.patch_model(model)
    prompt, completions = GROUPS[0]
    whole, tokens = causal_lm_loss(model, PackedBatch.from_groups([(prompt, completions)]))
    parts = [
        causal_lm_loss(model, PackedBatch.from_groups([(prompt, part)]))
        for part in (completions[:1], completions[1:])
    ]
    assert sum(count for _, count in parts) == tokens
    assert_equal_in_float64(sum(loss for loss, _ in parts), whole)


@pytest.mark.usefixtures("in_float64")
def test_dropout_has_one_mask_for_the_prefix_and_draws_others_for_each_suffix(make_llama):
    """Two equal completions differ by their own masks only; eval mode has no dropout."""
    model = make_llama(attention_dropout=0.5, num_hidden_layers=1).double()
    lctrain.patch_model(model)
    batch = PackedBatch.from_groups([(list(range(3, 40)), [[50, 51, 52], [50, 51, 52]])])
    first, second = completion_logits(model.eval(), batch).split(3)
    assert_equal_in_float64(first, second)
    torch.manual_seed(1)
    first, second = completion_logits(model.train(), batch).split(3)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(completion_logits(model, batch)[:3], first)


def attention_of_groups(q, k, v, backend, batch=None):
    """Attention of a pack with a shared prefix, of GROUPS[:1] by default."""
    from lctrain.attention.prefixes import add_prefixes, read_groups
    from lctrain_kernels.pack import checked_pack
    from lctrain_kernels.varlen.api import flash_attn_pack_func

    batch = PackedBatch.from_groups(GROUPS[:1]) if batch is None else batch
    longest = batch.max_seqlen
    pack = checked_pack(
        batch.cu_seqlens,
        batch.cu_seqlens,
        len(q),
        len(k),
        q.device,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    out, lse = flash_attn_pack_func(q, k, v, pack, causal=True, backend=backend)
    shared = read_groups(batch.groups, q.device)
    return add_prefixes(shared, q, k, v, out, lse, backend=backend)


def plain_attention(q, k, v, parts=None):
    """The same attention in plain PyTorch: every branch on its own, the prefix repeated."""
    parts = list(torch.arange(18).split([6, 4, 2, 6])) if parts is None else parts
    rows = []
    for number, part in enumerate(parts):
        branch = part if number == 0 else torch.cat([parts[0], part])
        keys, values = (x[branch].repeat_interleave(2, 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q[part], keys) * q.shape[-1] ** -0.5
        place = torch.arange(len(branch), device=q.device)
        hidden = place > place[-len(part) :, None]
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(rows)


def with_gradients(function, q, k, v, dout, dtype):
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v)
    out.backward(dout.to(dtype))
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@pytest.mark.parametrize("backend", ["triton", "pytorch"])
def test_the_kernels_are_within_twice_the_error_of_pytorch(backend):
    q, dout = torch.randn(2, 18, 4, 16)
    k, v = torch.randn(2, 18, 2, 16)
    q, k, v, dout = (x.half() for x in (q, k, v, dout))
    assert_errors_at_most_twice(
        with_gradients(
            lambda *qkv: attention_of_groups(*qkv, backend), q, k, v, dout, torch.float16
        ),
        with_gradients(plain_attention, q, k, v, dout, torch.float16),
        with_gradients(plain_attention, q, k, v, dout, torch.float64),
    )


@pytest.mark.gpu
def test_the_kernels_of_the_gpu_are_within_twice_the_error_of_pytorch():
    """Several tiles of the prefix and of the suffixes, on the backend that the GPU selects."""
    prompt, ends = list(range(700)), [list(range(n)) for n in (129, 1, 300)]
    batch = PackedBatch.from_groups([(prompt, ends)]).to("cuda")
    q, dout = torch.randn(2, batch.num_tokens, 4, 64, device="cuda")
    k, v = torch.randn(2, batch.num_tokens, 2, 64, device="cuda")
    inputs = [x.bfloat16() for x in (q, k, v, dout)]
    parts = list(torch.arange(batch.num_tokens, device="cuda").split(batch.lengths))
    assert_errors_at_most_twice(
        with_gradients(
            lambda *qkv: attention_of_groups(*qkv, "auto", batch), *inputs, torch.bfloat16
        ),
        with_gradients(lambda *qkv: plain_attention(*qkv, parts), *inputs, torch.bfloat16),
        with_gradients(lambda *qkv: plain_attention(*qkv, parts), *inputs, torch.float64),
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "groups must hold at least one group, got none"),
        ([([], [[1]])], r"got an empty prompt in groups\[0\]"),
        ([([1, 2], [[3]]), ([1], [])], r"got no completion in groups\[1\]"),
        ([([1, 2],)], r"groups must be pairs of a prompt and a list .* as groups\[0\]"),
        ([3], r"groups must be pairs of a prompt .*, got 3 as groups\[0\]"),
        ([([1, 2], [[3], []])], r"an empty one as groups\[0\]\[1\]\[1\]"),
    ],
)
def test_faulty_groups(groups, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_groups(groups)


def test_what_cannot_be_served_is_an_error(make_llama):
    batch = PackedBatch.from_groups(GROUPS)
    dual_chunk = {"attention": "dual_chunk", "chunk_size": 16, "local_size": 4}
    for options in (dual_chunk, {"attention": "differential"}):
        model = make_llama()
        if options["attention"] == "differential":
            model = to_differential(model)
        lctrain.patch_model(model, **options)
        message = f"shared prefixes must be flash, got {options['attention']}"
        with pytest.raises(ValueError, match=message):
            model(**batch.model_kwargs())
    model = make_llama()
    model.model.layers[1].self_attn.is_causal = False
    lctrain.patch_model(model)
    with pytest.raises(ValueError, match="prefixes must be causal, got a bidirectional layer"):
        model(**batch.model_kwargs())
    model = LlamaForSequenceClassification(make_llama(pad_token_id=0).config)
    lctrain.patch_model(model)
    with pytest.raises(ValueError, match="got LlamaForSequenceClassification with a head with one"):
        model(**batch.model_kwargs())
    model = make_llama()
    lctrain.patch_model(model, sliding_window=11)
    with pytest.raises(ValueError, match="sliding_window must be at least 12, the longest prompt"):
        model(**batch.model_kwargs())
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_llama(rope_parameters=scaling)
    lctrain.patch_model(model)
    with pytest.raises(ValueError, match="with rotary frequencies that depend on the document's"):
        model(**batch.model_kwargs())
    with pytest.raises(ValueError, match="a batch must be without shared prefixes"):
        batch.arguments()
    with pytest.raises(ValueError, match="at most max_tokens = 20 tokens, got 30"):
        PackedBatch.from_groups(GROUPS, max_tokens=20)


def test_the_isolation_check_takes_a_batch_with_groups(make_llama, tmp_path):
    """A prefix reaches its suffixes, which is no mixing of documents."""
    trainer = make_trainer(tmp_path, callbacks=[IsolationCheck()], max_steps=1)
    module = LongContextModule(make_llama())
    trainer.fit(module, loader([PackedBatch.from_groups(GROUPS)]))
    assert trainer.global_step == 1


def test_a_batch_with_groups_passes_lightnings_conversion():
    """Lightning's bf16-true sets every field of a batch to its converted value."""
    from lightning.fabric.plugins.precision.utils import _convert_fp_tensor
    from lightning_utilities.core.apply_func import apply_to_collection

    batch = PackedBatch.from_groups(GROUPS)
    same = apply_to_collection(batch, torch.Tensor, _convert_fp_tensor, torch.bfloat16)
    assert torch.equal(same.groups.suffix_tokens, batch.groups.suffix_tokens)
    assert dataclasses.is_dataclass(same)
