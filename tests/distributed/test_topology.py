"""Tests Topology; tests/house/test_ranks.py tests that it is the only source of rank and size."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lctrain.data.same_pack import pack_checksum
from lctrain.data.share import share_pack
from lctrain.distributed import Topology, topology
from lctrain.distributed.sharding import ShardRoot
from lctrain.distributed.strategy import ShardedStrategy, check_strategy
from lctrain.dropout_seed import seed_micro_batch
from lctrain.module import LongContextModule
from tests.distributed.threads import run_in_threads
from tests.training import make_batch


def test_ranks_of_a_trainer():
    assert Topology.of(None) == Topology()
    plain = SimpleNamespace(global_rank=3, world_size=4)
    assert Topology.of(plain) == Topology(3, 4)
    sharded = Topology(5, 8, replicas=2, context=2, is_sharded=True)
    of_strategy = SimpleNamespace(
        global_rank=5, world_size=8, strategy=SimpleNamespace(topology=sharded)
    )
    assert Topology.of(of_strategy) is sharded


@pytest.mark.parametrize("context", [1, 2, 4])
@pytest.mark.parametrize("replicas", [None, 1, 2])
def test_every_pack_belongs_to_one_context_group(context, replicas):
    ranks = [Topology(rank, 8, replicas, context) for rank in range(8)]
    places = [(each.data_rank, each.context_rank) for each in ranks]
    assert places == [(pack, share) for pack in range(8 // context) for share in range(context)]
    assert {each.data_size for each in ranks} == {8 // context}
    assert ranks[0].shards == {None: 1, 1: 8, 2: 4}[replicas]


def test_one_rank_reduces_without_a_process_group():
    ranks = Topology()
    tensor = torch.tensor([2.0])
    for reduce in (ranks.sum, ranks.minimum, ranks.maximum):
        assert reduce(tensor).item() == 2.0
    assert ranks.gather("a") == ["a"]
    assert ranks.of_first("a") == "a"
    assert ranks.cpu_group() is None


def test_sizes_must_divide_the_ranks():
    with pytest.raises(ValueError, match=r"must divide the number of ranks, got 2 \* 3 and 8 "):
        Topology(0, 8, replicas=2, context=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_parallel": 0}, "trainer.context_parallel must be at least 1, got 0"),
        ({"context_exchange": "ring"}, "context_exchange must be one of auto, heads, keys, got 'r"),
    ],
)
def test_ways_to_share_packs(options, message):
    with pytest.raises(ValueError, match=message):
        ShardedStrategy(**options)


def test_peers_of_a_context_group_share_a_seed_only_with_the_first():
    """The first rank draws the seeds of attention dropout, as the only rank of its pack would."""
    seeds = {}
    for size, context in ((4, 2), (2, 1)):
        for rank in range(size):
            ranks = Topology(rank, size, replicas=1, context=context)
            strategy = SimpleNamespace(topology=ranks)
            loop = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=7))
            seed_micro_batch(SimpleNamespace(strategy=strategy, fit_loop=loop), seed=3)
            seeds[size, rank] = torch.initial_seed()
    assert seeds[4, 0] == seeds[2, 0]
    assert seeds[4, 2] == seeds[2, 1]
    assert len({seeds[4, rank] for rank in range(4)}) == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_shared_packs_of_encoders_are_refused(make_llama, monkeypatch, ranks):
    module = LongContextModule(make_llama(), task="mlm")
    strategy = ShardedStrategy(context_parallel=ranks)
    trainer = SimpleNamespace(precision="32-true", strategy=strategy)
    monkeypatch.setattr(LongContextModule, "trainer", trainer)
    message = r"context_parallel must be 1 with task=mlm, got 2: .*Leave it out"
    with pytest.raises(ValueError, match=message) if ranks > 1 else nullcontext():
        module.setup("fit")


def test_a_model_is_sharded_once_per_strategy(make_llama):
    strategy = ShardedStrategy()
    strategy.root = ShardRoot(make_llama())
    assert strategy.shard(strategy.root.model) is strategy.root


def test_checksums_see_lengths_tokens_and_labels():
    """Shares of one pack have the checksum of their lengths and ids."""
    pack = make_batch((20, 30))
    tokens, labels = pack.input_ids.clone(), pack.labels.clone()
    tokens[0, -1] += 1
    labels[0, 3] = -100
    others = [
        make_batch((30, 20)),
        replace(pack, input_ids=tokens),
        replace(pack, input_ids=pack.input_ids.flip(1)),
        replace(pack, labels=labels),
        share_pack(pack, 2, 0),
        share_pack(make_batch((30, 20)), 2, 0),
    ]
    found = [int(pack_checksum(each)) for each in (pack, *others)]
    assert len(set(found)) == len(found)
    assert pack_checksum(pack) == pack_checksum(make_batch((20, 30)))
    assert pack_checksum(share_pack(pack, 2, 1)) == pack_checksum(others[-2])


def test_quantized_weights_are_not_divided(make_llama):
    model = make_llama()
    model.model.embed_tokens.weight.quant_state = "4 bits"  # the mark of bitsandbytes
    with pytest.raises(ValueError, match=r"must have dense weights .*such as model.embed_tokens.w"):
        ShardedStrategy().shard(model)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_other_sharded_strategies_are_refused(name):
    with pytest.raises(ValueError, match=rf"strategy must be ShardedStrategy .*got {name}: "):
        check_strategy(type(name, (), {})())
    check_strategy(ShardedStrategy())
    check_strategy(type("DDPStrategy", (), {})())


def test_all_ranks_fail_if_one_does(monkeypatch):
    ranks = Topology(1, 3, is_sharded=True)
    others: list = [None, None, None]

    def exchange(_, value):
        return [others[0], value, others[2]]

    monkeypatch.setattr(Topology, "_exchange", exchange)
    with ranks.failing_together():
        pass
    with pytest.raises(OSError, match="its own"), ranks.failing_together():
        raise OSError("its own")
    others[2] = topology._Failure("rank 2 cannot read its files")
    with pytest.raises(ValueError, match="rank 2 cannot read"), ranks.failing_together():
        pass
    with pytest.raises(OSError, match="its own"), ranks.failing_together():
        raise OSError("its own")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("step", range(4))
def test_a_rank_that_fails_between_exchanges_ends_the_others(step, failing, nested):
    """A rank may fail before, between and after the exchanges that the others wait in."""

    def body(ranks):
        for number in range(3):
            if ranks.rank == failing and number == step:
                raise OSError(f"rank {failing} is out of memory")
            assert ranks.gather((ranks.rank, number)) == [(0, number), (1, number)]
        if ranks.rank == failing and step == 3:
            raise OSError(f"rank {failing} is out of memory")

    def run(ranks):
        around = ranks.failing_together() if nested else nullcontext()
        with around, ranks.failing_together():
            body(ranks)

    errors = run_in_threads(run, 2)
    assert [type(error) for error in errors][failing] is OSError
    assert type(errors[1 - failing]) is topology.OtherRankError
    assert {str(error) for error in errors} == {f"rank {failing} is out of memory"}
