"""Compares the Hopper variants of dual chunk attention with the arguments of its launchers."""

import pytest
import torch

from lctrain.kernels import make_schedule
from lctrain_kernels.dual_chunk import aot_hopper as aot
from lctrain_kernels.dual_chunk import hopper, hopper_dq
from lctrain_kernels.dual_chunk.hopper_support import (
    BackwardForm,
    backward_form,
    override_backward,
)
from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.gluon.config import BackwardTile
from lctrain_kernels.gluon.variant import HEADS_KV
from tests.kernels.launches import (
    EachLaunch,
    Launches,
    describe_for_a_compiler,
    launches_of,
    options_of,
    pack_of,
)


@pytest.fixture
def launches(monkeypatch):
    """Replaces all kernels but the rotations by recorders; returns the recorders by name."""
    monkeypatch.setattr(hopper, "dual_chunk_rotate", lambda *_, **__: None)
    monkeypatch.setattr(hopper, "rotated_keys", lambda k, *_, **__: torch.empty_like(k))
    return launches_of(hopper_dq, monkeypatch) | launches_of(hopper, monkeypatch)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 4, 6])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("features", aot.FEATURES)
def test_variants_are_what_is_launched(features, head_dim, group, dtype, launches, monkeypatch):
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    q = torch.zeros(300, HEADS_KV * group, head_dim, dtype=kind)
    k = torch.zeros(300, HEADS_KV, head_dim, dtype=kind)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    inv_freq = torch.zeros(head_dim // 2)
    logit_scale = torch.ones(2) if features == "all" else None
    operands = Operands(q, k, k, inv_freq, logit_scale, 40, 7)
    rotation = Rotation(inv_freq, 33, 7, 40)
    pack, options = pack_of(cu, schedule, features), options_of(features)
    out, lse = hopper.dual_chunk_fwd(operands, rotation, pack, options)
    variant = aot.forward_variant(head_dim, features=features, dtype=dtype, group=group)
    launches["dual_chunk_fwd_hopper_kernel"].assert_described_by(variant)
    if "dropout" in features:
        return  # the portable kernels have this backward
    kept = {}
    for relation in aot.RELATIONS:
        kept[relation] = Launches(hopper.dual_chunk_bwd_hopper_kernel.kernel)
    rest = iter(kept.values())
    monkeypatch.setattr(hopper, "dual_chunk_bwd_hopper_kernel", EachLaunch(rest))
    hopper.dual_chunk_bwd(q, None, operands, rotation, out, lse, pack, options)
    for relation, launched in kept.items():
        launched.assert_described_by(
            aot.backward_variant(
                head_dim, features=features, dtype=dtype, group=group, relation=relation
            )
        )


def test_variants_of_the_kernels_beside_are_what_is_launched(launches, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    schedule = make_schedule([200, 100])
    q = torch.zeros(300, HEADS_KV * 4, 64, dtype=torch.bfloat16)
    k = torch.zeros(300, HEADS_KV, 64, dtype=torch.bfloat16)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    inv_freq, lse = torch.zeros(32), torch.zeros(HEADS_KV * 4, 300)
    operands = Operands(q, k, k, inv_freq, torch.ones(2), 40, 7)
    rotation = Rotation(inv_freq, 33, 7, 40)
    pack, options = pack_of(cu, schedule, "causal"), options_of("causal")
    with override_backward(BackwardForm(BackwardTile(64, 3), full_weights=True)):
        hopper.dual_chunk_bwd(q, None, operands, rotation, q, lse, pack, options)
    for name, variant in {
        "dual_chunk_rotate_dk_kernel": aot.rotate_dk_variant(64),
        "dual_chunk_round_dq_kernel": aot.round_dq_variant(64, HEADS_KV * 4),
    }.items():
        launches[name].assert_described_by(variant)


@pytest.mark.parametrize("tokens", [300, 20], ids=["long", "short"])
@pytest.mark.parametrize("head_dim", [64, 112, 128])
def test_variants_of_the_later_form_are_what_is_launched(head_dim, tokens, monkeypatch):
    describe_for_a_compiler(aot, monkeypatch)
    q = torch.zeros(tokens, HEADS_KV * 4, head_dim, dtype=torch.bfloat16)
    k = torch.zeros(tokens, HEADS_KV, head_dim, dtype=torch.bfloat16)
    cu = torch.tensor([0, tokens - 1, tokens], dtype=torch.int32)
    inv_freq, lse = torch.zeros(head_dim // 2), torch.zeros(HEADS_KV * 4, tokens)
    operands = Operands(q, k, k, inv_freq, torch.ones(2), 40, 7)
    rotation = Rotation(inv_freq, 33, 7, 40)
    pack, options = pack_of(cu, make_schedule([tokens - 1, 1]), "causal"), options_of("causal")
    monkeypatch.setattr(hopper, "dual_chunk_rotate", lambda *_, **__: None)
    monkeypatch.setattr(hopper, "rotated_keys", lambda k, *_, **__: torch.empty_like(k))
    launches_of(hopper, monkeypatch)
    kernel = hopper.dual_chunk_bwd_hopper_kernel.kernel
    kept = {relation: Launches(kernel) for relation in aot.RELATIONS}
    monkeypatch.setattr(hopper, "dual_chunk_bwd_hopper_kernel", EachLaunch(iter(kept.values())))
    slabs = [Launches(hopper_dq.dual_chunk_dq_slabs_kernel) for _ in range(2)]
    monkeypatch.setattr(hopper_dq, "dual_chunk_dq_slabs_kernel", EachLaunch(iter(slabs)))
    with override_backward(BackwardForm(BackwardTile(64, 3, True), full_weights=True)):
        form = backward_form(head_dim, tokens, 2)
        hopper.dual_chunk_bwd(q, None, operands, rotation, q, lse, pack, options)
    assert form.tile.reduce_from_registers == (tokens == 300)
    assert form.full_weights
    for relation, launched in kept.items():
        described = {"features": "all", "relation": relation, "form": form}
        types = aot.backward_variant(head_dim, **described)
        launched.assert_described_by(types)
    if tokens == 300:
        for rounds, launched in zip((False, True), slabs, strict=True):
            launched.assert_described_by(aot.dq_slabs_variant(head_dim, HEADS_KV * 4, rounds))
