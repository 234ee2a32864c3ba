"""Tests the share of a pack that a batch carries, on one process."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DiffLlamaConfig, GPT2Config, GPTBigCodeConfig, LlamaConfig

import lctrain
from lctrain.attention.boundaries import find_lengths, find_positions
from lctrain.batch import IGNORE_INDEX, SHARE_ARGUMENT
from lctrain.data.loader import PlacedBatch
from lctrain.data.share import collate_share, share_pack
from lctrain.distributed import context
from lctrain.distributed.share import PackShare
from lctrain.distributed.shared_pack import ContextGroups
from lctrain.models.shared_attention import heads_group, key_heads
from tests.distributed.simulated import Ranks, groups_of
from tests.models.tiny import VOCABULARY, tiny_model
from tests.numerics import assert_equal_in_float64
from tests.training import make_batch

LENGTHS = ((700, 5, 300), (40,), (1, 1, 1), (2049,))


@pytest.mark.parametrize(("size", "heads"), [(1, 1), (2, 1), (3, 3), (8, 1), (8, 2)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_shares_hold_every_token_and_label_once(lengths, size, heads):
    """Labels are those of the whole pack, also where the next token is another rank's."""
    batch = make_batch(lengths)
    shares = [share_pack(batch, size, rank, heads) for rank in range(size)]
    for name in ("input_ids", "labels", "position_ids"):
        found = torch.full_like(batch.labels, -1)
        for each in shares:
            places = each.share.places[: each.share.tokens]
            found[:, places] = getattr(each, name)[:, : each.share.tokens]
        assert torch.equal(found, getattr(batch, name)), name
    assert sum(each.num_tokens for each in shares) == batch.num_tokens
    assert sum(each.num_valid_tokens for each in shares) == batch.num_valid_tokens
    assert {each.lengths for each in shares} == {batch.lengths}


def test_a_share_without_tokens_has_a_filler_without_a_target():
    shares = [share_pack(make_batch((40,)), 2, rank) for rank in range(2)]
    (empty,) = (each for each in shares if each.num_tokens == 0)
    assert empty.input_ids.shape == (1, 1)
    assert empty.labels.tolist() == [[IGNORE_INDEX]]
    assert empty.num_valid_tokens == 0


def test_a_share_goes_where_its_batch_goes():
    share = share_pack(make_batch((700,)), 2, 1).share
    assert share.to("cpu").places is share.places
    assert share.to("meta").places.device.type == "meta"


def test_a_share_stays_shared_on_its_device():
    batch = share_pack(make_batch((700,)), 2, 1)
    share = batch.share.shared_by(ContextGroups(), batch.document_ids)
    assert share.to("cpu").shared is share.shared
    with pytest.raises(ValueError, match=r"call PackShare.shared_by after the move to the device"):
        _ = share.to("meta").shared


@pytest.mark.parametrize("lengths", [(700, 5, 300), (40,)])
def test_gathering_holds_the_result_and_no_second_copy(lengths, monkeypatch):
    """Every rank sends its rows in turn, without padding, to where they belong."""
    whole = torch.randn(sum(lengths), 8)
    shares = [share_pack(make_batch(lengths), 4, rank).share for rank in range(4)]
    rows = [whole[each.places] for each in shares]
    ids = torch.zeros(len(lengths), dtype=torch.int32)
    shares = [each.shared_by(ContextGroups(), ids) for each in shares]
    sent = []

    def broadcast(tensor, group, group_src):
        sent.append((group_src, tensor.data_ptr()))
        tensor.copy_(rows[group_src][: shares[group_src].tokens])

    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    for rank, share in enumerate(shares):
        sent.clear()
        assert torch.equal(share.gather(rows[rank]), whole)
        assert [source for source, _ in sent] == [r for r in range(4) if shares[r].tokens]
        assert dict(sent).get(rank, rows[rank].data_ptr()) == rows[rank].data_ptr(), (
            "own rows copied"
        )


def test_the_collator_shares_items_of_streams_too():
    assert collate_share(1, 0, 1) is None
    share = collate_share(2, 1, 1)
    batch = make_batch((700, 9))
    expected = share_pack(batch, 2, 1)
    for item in (batch, PlacedBatch(batch, {"window": 3})):
        found = share(item)
        found = found.batch if isinstance(found, PlacedBatch) else found
        assert torch.equal(found.input_ids, expected.input_ids)


def test_positions_and_lengths_are_those_of_the_whole_documents(make_llama, monkeypatch):
    """Boundaries made from a share's own tokens would begin at its first chunk."""
    batch = make_batch((700, 5, 300))
    share = share_pack(batch, 2, 1)
    monkeypatch.setattr(type(share.share), "check", lambda *_: None)
    model = make_llama()
    with lctrain.patch_model(model) as handle:
        hook = next(iter(handle.model._forward_pre_hooks.values()))
        _, inputs = hook(model, (), share.model_kwargs())
    boundaries = inputs["lctrain_boundaries"]
    assert SHARE_ARGUMENT not in inputs
    assert boundaries.queries == boundaries.keys == tuple(share.input_ids.shape)
    assert boundaries.pack.total_q == batch.num_tokens
    assert torch.equal(find_positions(boundaries), share.position_ids)
    whole = torch.tensor(batch.lengths).repeat_interleave(torch.tensor(batch.lengths))
    assert torch.equal(find_lengths(boundaries, share.position_ids)[0], whole[share.share.places])


def tokens_of(lengths):
    """Returns a pack of tokens that tiny models have, none of which is padding."""
    batch = make_batch(lengths)
    return dataclasses.replace(batch, input_ids=batch.input_ids % (VOCABULARY - 2) + 2)


@pytest.mark.parametrize("given", [True, False], ids=["position_ids", "none"])
@pytest.mark.parametrize("lengths", [(50, 12), (12, 50), (100, 5, 64), (90,)])
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
@pytest.mark.usefixtures("in_float64")
def test_positions_that_begin_after_the_padding(family, lengths, given, monkeypatch):
    """Every rank's share has the position ids, and so the logits, of the whole pack."""
    monkeypatch.setattr(context, "BORDER", 16)
    classes = {"roberta": "RobertaForCausalLM", "xlm-roberta": "XLMRobertaForMaskedLM"}
    model_class = getattr(transformers, classes[family])
    model = tiny_model(family, model_class, pad_token_id=1, max_position_embeddings=128)
    batch = tokens_of(lengths)
    ranks = Ranks(2)
    shares = [share_pack(batch, 2, rank, 2) for rank in range(2)]

    def run(rank):
        groups = ContextGroups(*groups_of(rank, 2, 2))
        share = shares[rank].share.shared_by(groups, batch.document_ids)
        arguments = dataclasses.replace(shares[rank], share=share).model_kwargs()
        if not given:
            del arguments["position_ids"]
        with torch.no_grad():
            return model(**arguments).logits[0]

    with lctrain.patch_model(model):
        expected = model(**batch.model_kwargs()).logits[0]
        for share, found in zip(shares, ranks.run(run, monkeypatch), strict=True):
            assert_equal_in_float64(found, expected[share.share.places])


@pytest.mark.parametrize("lengths", [(700, 5, 300), (1, 40, 2049), (40,)])
@pytest.mark.parametrize(("size", "heads"), [(2, 1), (3, 3), (8, 2)])
def test_first_position_of_a_share(lengths, size, heads):
    batch = make_batch(lengths)
    for rank in range(size):
        share = share_pack(batch, size, rank, heads)
        assert share.share.first_position == int(share.position_ids[0, 0])


def test_wrong_positions_are_refused_on_every_rank(monkeypatch):
    monkeypatch.setattr(context, "BORDER", 16)
    monkeypatch.setattr(PackShare, "check", lambda *_: None)
    model = tiny_model("roberta", transformers.RobertaForCausalLM, pad_token_id=1)
    batch = make_batch((20, 12))
    with lctrain.patch_model(model):
        for rank in range(2):
            arguments = share_pack(batch, 2, rank, 2).model_kwargs()
            arguments["position_ids"] = arguments["position_ids"] + 1
            with pytest.raises(ValueError, match=r"must begin at 2 in every document .*, got 1"):
                model(**arguments)


@pytest.mark.parametrize("lengths", [(40,), (20, 5, 33)])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForSequenceClassification"),
        ("bert", "BertForQuestionAnswering"),
        ("bert", "BertForNextSentencePrediction"),
        ("bert", "BertModel"),
        ("albert", "AlbertModel"),
        ("bert", "BertForPreTraining"),
    ],
)
def test_pooled_documents_are_refused(family, name, lengths, monkeypatch):
    """Some refuse before the first layer, models with a pooler inside after their encoder."""
    monkeypatch.setattr(context, "BORDER", 16)
    monkeypatch.setattr(PackShare, "check", lambda *_: None)
    model = tiny_model(family, getattr(transformers, name), pad_token_id=0)
    batch = tokens_of(lengths)
    ranks = Ranks(2)

    def run(rank):
        part = share_pack(batch, 2, rank, 2)
        share = part.share.shared_by(ContextGroups(*groups_of(rank, 2, 2)), batch.document_ids)
        model(**dataclasses.replace(part, share=share).model_kwargs())

    message = "must give one output per token where ranks share a pack, got .* divided over 2 ranks"
    with lctrain.patch_model(model), pytest.raises(ValueError, match=message):
        ranks.run(run, monkeypatch)


def test_pooled_documents_are_refused_before_training():
    model = tiny_model("llama", transformers.LlamaForSequenceClassification, pad_token_id=0)
    with (
        lctrain.patch_model(model),
        pytest.raises(ValueError, match="must give one output per token where ranks share"),
    ):
        heads_group(model, 2, "auto")


def test_a_share_has_no_arguments_for_a_loss_of_the_model():
    """The model would shift labels, and drop the last one, which another rank's token follows."""
    share = share_pack(make_batch((700,)), 2, 0)
    with pytest.raises(ValueError, match=r"must be a whole pack for a model .*, got one of 2 shar"):
        share.arguments()


def test_a_share_without_a_process_group_is_refused(make_llama):
    model = make_llama()
    share = share_pack(make_batch((700,)), 2, 0)
    with (
        lctrain.patch_model(model),
        pytest.raises(ValueError, match="must be computed by 2 ranks"),
    ):
        model(**share.model_kwargs())


def test_inputs_must_be_those_of_the_share():
    batch = share_pack(make_batch((700,)), 2, 0)
    share = batch.share.shared_by(ContextGroups(), batch.document_ids)
    tokens = len(share.places)
    share.check((1, tokens), True)
    for rows, has_boundaries in (((1, 700), True), ((2, tokens), True), ((1, tokens), False)):
        with pytest.raises(ValueError, match=f"must be the {tokens} tokens of the share"):
            share.check(rows, has_boundaries)


@pytest.mark.parametrize(
    ("heads", "ranks", "exchange", "expected"),
    [(2, 4, "auto", 2), (2, 2, "heads", 2), (2, 2, "keys", 1), (4, 2, "auto", 2)],
)
def test_ranks_that_exchange_heads(make_llama, heads, ranks, exchange, expected):
    model = make_llama(num_attention_heads=4, num_key_value_heads=heads)
    with lctrain.patch_model(model):
        assert heads_group(model, ranks, exchange) == expected


def test_heads_that_ranks_cannot_divide(make_llama):
    model = make_llama(num_attention_heads=4, num_key_value_heads=2)
    with (
        lctrain.patch_model(model),
        pytest.raises(ValueError, match=r"must divide the key/value heads .*4 ranks and 2 heads"),
    ):
        heads_group(model, 4, "heads")


def test_differential_heads_are_pairs():
    assert key_heads(DiffLlamaConfig(num_attention_heads=8, num_key_value_heads=4)) == 2
    assert key_heads(LlamaConfig(num_attention_heads=8, num_key_value_heads=4)) == 4
    assert key_heads(GPT2Config(n_head=6)) == 6
    assert key_heads(object()) == 1


def test_key_heads_of_every_layer():
    assert key_heads(GPTBigCodeConfig(n_head=4, multi_query=True)) == 1
    assert key_heads(GPTBigCodeConfig(n_head=4, multi_query=False)) == 4
    for counts, expected in (([4, 8], 4), ([8, 6], 2), ((8, 8), 8), ([4, None], 1)):
        config = SimpleNamespace(num_key_value_heads=counts, num_attention_heads=8)
        assert key_heads(config) == expected


def test_heads_of_a_multi_query_model_are_not_exchanged():
    model = tiny_model("gpt_bigcode", transformers.GPTBigCodeForCausalLM)
    with lctrain.patch_model(model):
        assert heads_group(model, 2, "auto") == 1
        with pytest.raises(ValueError, match="2 ranks and 1 heads"):
            heads_group(model, 2, "heads")


def test_attention_of_the_model_itself_is_refused(make_llama):
    with pytest.raises(ValueError, match="must have lctrain's attention with"):
        heads_group(make_llama(), 2, "auto")


def test_keys_are_not_exchanged_for_attention_to_the_future(make_llama):
    model = make_llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with lctrain.patch_model(model):
        heads_group(model, 2, "auto")
        with pytest.raises(ValueError, match="must exchange heads in LlamaForCausalLM"):
            heads_group(model, 2, "keys")
