"""Compares the Hopper variants of differential attention with the arguments of its launchers."""

import pytest
import torch

from lctrain.kernels import make_schedule
from lctrain_kernels.differential import aot_hopper as aot
from lctrain_kernels.differential import hopper
from lctrain_kernels.differential.hopper_support import COLUMNS, override_backward
from lctrain_kernels.gluon.variant import FEATURES, HEADS_KV
from tests.kernels.launches import describe_for_a_compiler, launches_of, options_of, pack_of


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("dims", COLUMNS, ids="D{0[0]}v{0[1]}-{0[2]}".format)
@pytest.mark.parametrize("features", [name for name in FEATURES if name != "deterministic"])
def test_variants_are_what_is_launched(features, dims, group, dtype, monkeypatch):
    launches = launches_of(hopper, monkeypatch)
    head_dim, value_dim, shared_k = dims
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    tokens, heads = 300, HEADS_KV * group
    q = torch.zeros(tokens, heads, head_dim, dtype=kind)
    k = torch.zeros(tokens, HEADS_KV, head_dim, dtype=kind)
    v = torch.zeros(tokens, HEADS_KV, value_dim, dtype=kind)
    lam = torch.zeros(()).expand(tokens, heads)
    operands = (q, q, k, None if shared_k else k, v, lam)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    pack, options = pack_of(cu, schedule, features), options_of(features)
    out, *results = hopper.differential_fwd(*operands, pack, options)
    described = {"features": features, "dtype": dtype, "group": group}
    variant = aot.forward_variant(*dims, **described)
    launches["differential_fwd_hopper_kernel"].assert_described_by(variant)
    if "dropout" in features or (head_dim == 128 and not shared_k):
        return  # the portable kernels have this backward
    hopper.differential_bwd(out, None, None, *operands, *results, pack, options)
    variant = aot.backward_variant(*dims, **described)
    launches["differential_bwd_hopper_kernel"].assert_described_by(variant)


@pytest.mark.parametrize(("tokens", "short"), [(300, False), (20, True)], ids=["long", "short"])
@pytest.mark.parametrize("dims", [(64, 128, False), (128, 128, True)], ids=["v1", "v2"])
def test_the_variant_from_registers_is_what_is_launched(dims, tokens, short, monkeypatch):
    launches = launches_of(hopper, monkeypatch)
    head_dim, value_dim, shared_k = dims
    q = torch.zeros(tokens, HEADS_KV * 4, head_dim, dtype=torch.bfloat16)
    k = torch.zeros(tokens, HEADS_KV, head_dim, dtype=torch.bfloat16)
    v = torch.zeros(tokens, HEADS_KV, value_dim, dtype=torch.bfloat16)
    out = torch.zeros(tokens, HEADS_KV * 4, value_dim, dtype=torch.bfloat16)
    lse = torch.zeros(HEADS_KV * 4, tokens)
    cu = torch.tensor([0, tokens - 1, tokens], dtype=torch.int32)
    pack = pack_of(cu, make_schedule([tokens - 1, 1]), "causal")
    lam = torch.zeros(()).expand(tokens, HEADS_KV * 4)
    operands = (q, q, k, None if shared_k else k, v, lam, out, out, lse, lse)
    with override_backward(True):
        hopper.differential_bwd(out, lse, lse, *operands, pack, options_of("causal"))
        variant = aot.backward_variant(*dims, short_documents=short)
    launches["differential_bwd_hopper_kernel"].assert_described_by(variant)
    if not short and shared_k is False:
        describe_for_a_compiler(aot, monkeypatch)
        prepare = aot.prepare_variant(head_dim, value_dim, HEADS_KV * 4, zeroes=False)
        launches["differential_prepare_kernel"].assert_described_by(prepare)


def test_variants_of_the_kernels_beside_are_what_is_launched(monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    launches = launches_of(hopper, monkeypatch)
    heads = HEADS_KV * 4
    q = torch.zeros(300, heads, 64, dtype=torch.bfloat16)
    k = torch.zeros(300, HEADS_KV, 64, dtype=torch.bfloat16)
    v = torch.zeros(300, HEADS_KV, 128, dtype=torch.bfloat16)
    out, lse = torch.zeros(300, heads, 128, dtype=torch.bfloat16), torch.zeros(heads, 300)
    lam = torch.zeros(()).expand(300, heads)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    pack = pack_of(cu, make_schedule([200, 100]), "causal")
    operands = (q, q, k, k, v, lam, out, out, lse, lse)
    with override_backward(False):
        hopper.differential_bwd(out, lse, lse, *operands, pack, options_of("causal"))
    prepare = aot.prepare_variant(64, 128, heads)
    launches["differential_prepare_kernel"].assert_described_by(prepare)
    round_dq = aot.round_dq_variant(64, heads)
    launches["differential_round_dq_kernel"].assert_described_by(round_dq)
