"""Compares the Hopper variants of varlen attention with the arguments of its launchers."""

import pytest
import torch

from lctrain.kernels import make_schedule
from lctrain_kernels.gluon import config
from lctrain_kernels.gluon.variant import FEATURES, HEADS_KV
from lctrain_kernels.varlen import aot_hopper as aot
from lctrain_kernels.varlen import hopper
from tests.kernels.launches import describe_for_a_compiler, launches_of, options_of, pack_of


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 4, 6])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("features", FEATURES)
def test_variants_are_what_is_launched(features, head_dim, group, dtype, monkeypatch):
    launches = launches_of(hopper, monkeypatch)
    everything = features == "all"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    tokens, heads = 300, HEADS_KV * group
    q = torch.zeros(tokens, heads, head_dim, dtype=kind)
    k = torch.zeros(tokens, HEADS_KV, head_dim, dtype=kind)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    pack = pack_of(cu, schedule, features)
    options = options_of(features)._replace(
        softcap=20.0 if everything else 0.0,
        learnable_sink=torch.zeros(heads) if everything else None,
    )
    out, lse = hopper.varlen_fwd(q, k, k, pack, options)
    variant = aot.forward_variant(head_dim, features=features, dtype=dtype, group=group)
    launches["varlen_fwd_hopper_kernel"].assert_described_by(variant)
    if head_dim > 128 and features == "deterministic":
        return  # the portable kernels have this backward
    hopper.varlen_bwd(q, None, q, k, k, out, lse, pack, options)
    variant = aot.backward_variant(head_dim, features=features, dtype=dtype, group=group)
    persistent = head_dim <= 64 and features in ("causal", "full")
    kind = "_persistent" if persistent else "_wide" if head_dim > 128 else ""
    launches[f"varlen_bwd{kind}_hopper_kernel"].assert_described_by(variant)


@pytest.mark.parametrize("kind", ["short", "long"])
def test_variants_for_documents_of_other_lengths(kind, monkeypatch):
    head_dim, lengths = (128, [config.LONG]) if kind == "long" else (64, [1] * 20)
    launches = launches_of(hopper, monkeypatch)
    q = torch.zeros(sum(lengths), HEADS_KV, head_dim, dtype=torch.bfloat16)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pack = pack_of(cu, make_schedule(lengths), "causal")
    lse = torch.zeros(HEADS_KV, sum(lengths))
    hopper.varlen_bwd(q, None, q, q, q, q, lse, pack, options_of("causal"))
    variant = aot.backward_variant(head_dim, group=1, **{f"{kind}_documents": True})
    kernel = "varlen_bwd_hopper_kernel" if kind == "long" else "varlen_bwd_persistent_hopper_kernel"
    launches[kernel].assert_described_by(variant)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_variants_of_the_kernels_beside_are_what_is_launched(head_dim, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(hopper, monkeypatch)
    q = torch.zeros(300, HEADS_KV * 4, head_dim, dtype=torch.bfloat16)
    k = torch.zeros(300, HEADS_KV, head_dim, dtype=torch.bfloat16)
    cu, lse = torch.tensor([0, 200, 300], dtype=torch.int32), torch.zeros(HEADS_KV * 4, 300)
    pack = pack_of(cu, make_schedule([200, 100]), "dropout")
    hopper.varlen_bwd(q, lse, q, k, k, q, lse, pack, options_of("dropout"))
    prepare = aot.prepare_variant(head_dim, HEADS_KV * 4)
    launches["varlen_prepare_kernel"].assert_described_by(prepare)
    if head_dim in (64, 256):  # dq is added from registers
        round_dq = aot.round_dq_variant(head_dim, HEADS_KV * 4)
        launches["varlen_round_dq_kernel"].assert_described_by(round_dq)
