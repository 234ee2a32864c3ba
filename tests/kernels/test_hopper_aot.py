"""The Hopper kernels compile without a GPU, as they are launched, on both ends of Triton."""

import re

import pytest
import torch
from triton.runtime.jit import mangle_type

from lctrain.kernels import make_schedule
from lctrain_kernels import aot_hopper as aot
from lctrain_kernels.differential import hopper as differential
from lctrain_kernels.dual_chunk import hopper as dual_chunk
from lctrain_kernels.dual_chunk.operands import Operands, Rotation
from lctrain_kernels.gluon import barriers
from lctrain_kernels.gluon.config import DIFFERENTIAL_COLUMNS
from lctrain_kernels.options import AttentionOptions
from lctrain_kernels.pack import TiledPack
from lctrain_kernels.varlen import hopper as varlen
from tests.kernels.aot_process import BETWEEN, VERSIONS, compiled_reports, on_triton

SHARED_LIMIT = 232_448  # bytes that a program on sm_90 may ask for


@pytest.mark.slow
@pytest.mark.parametrize("version", on_triton(VERSIONS))
def test_compiles_to_what_the_hardware_has(version):
    everything = compiled_reports(version, "hopper")
    reports = [report for report in everything if report["multiplies"]]
    scalar = [report["name"] for report in reports if report["matrix_instructions"] == 0]
    assert not scalar, "these multiply without matrix instructions"
    copying = [report["name"] for report in reports if report["tma_loads"] == 0]
    assert not copying, "these load without the copy engine"
    large = {r["name"]: r["shared_bytes"] for r in everything if r["shared_bytes"] > SHARED_LIMIT}
    assert not large, f"these need more than the {SHARED_LIMIT} bytes of shared memory of sm_90"
    for report in reports:
        free = barriers.V_EMPTY.value if "_fwd-" in report["name"] else barriers.DS_FULL.value
        assert 0 in report["barriers"], "every kernel brings its first warpgroup together"
        assert max(report["barriers"]) < free, f"{report['name']}: Triton takes our barriers"
    plain = [report for report in reports if "-causal-" in report["name"]]
    serialised = [report["name"] for report in plain if report["serialised"]]
    assert not serialised, "ptxas runs the matrix instructions of these one by one"
    beside = [report for report in everything if not report["multiplies"]]
    assert beside, "the launchers prepare and round in kernels of their own"
    assert not [r["name"] for r in beside if r["spill_bytes"]], "these spill registers"
    promised = [report for report in plain if report["spill_free"]]
    assert promised, "the forward promises kernels without spills"
    for report in promised:
        assert len(report["loop_spills"]) >= 2, f"{report['name']}: where are its loops?"
    looping = [*promised, *(r for r in plain if r["name"].startswith("hopper_diff_fwd-D64"))]
    spilling = {r["name"]: r["loop_spills"] for r in looping if any(r["loop_spills"])}
    assert not spilling, "the loops of these spill registers"
    if version == VERSIONS[0]:
        backwards = [report for report in plain if "_bwd" in report["name"]]
        # At 128 columns of varlen the second warpgroup keeps in memory where a thread's dS goes and
        # bounds of masks, read early enough.
        wide = re.compile("hopper_bwd-D(96|128)-")
        spilling = {
            r["name"]: r["loop_spills"]
            for r in backwards
            if any(r["loop_spills"][:-1]) or r["loop_spills"][-1] > 13 * bool(wide.match(r["name"]))
        }
        assert not spilling, "products wait for spilled registers: see held in step.py"
    if version == VERSIONS[0]:  # the newest stores a few arguments away when a program begins
        spilling = {r["name"]: r["spill_bytes"] for r in promised if r["spill_bytes"]}
        assert not spilling, "these spill registers"


@pytest.mark.slow
@pytest.mark.parametrize("version", on_triton(BETWEEN))
def test_compiles_on_the_releases_between(version):
    reports = compiled_reports(version, "hopper")
    kernels = {report["name"].split("-")[0] for report in reports}
    assert {"hopper_fwd", "hopper_bwd", "hopper_diff_fwd", "hopper_diff_bwd"} <= kernels
    multiplying = [report for report in reports if report["multiplies"]]
    assert all(report["matrix_instructions"] and report["tma_loads"] for report in multiplying)


def types_of(argument):
    """Triton's name of an argument's type; of a group, the names of its fields' types."""
    if isinstance(argument, tuple):
        return type(argument)(*map(types_of, argument))
    return "constexpr" if argument is None else mangle_type(argument)


class Launches:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        names = self.kernel.arg_names
        self.arguments = dict(zip(names, args, strict=False))
        self.arguments |= {name: options.pop(name) for name in names if name in options}
        self.options = options

    def assert_described_by(self, variant):
        """Holds the types, constants and options of a variant against the launch."""
        constants = {
            name: variant.constants[(i,)]
            for i, name in enumerate(variant.signature)
            if (i,) in variant.constants
        }
        assert list(self.arguments) == list(variant.signature)
        assert {name: self.arguments[name] for name in constants} == constants
        types = {name: types_of(x) for name, x in self.arguments.items() if name not in constants}
        assert types == {name: variant.signature[name] for name in types}
        assert self.options.items() <= variant.options.items()


def pack_of(cu_seqlens, schedule, dropout):
    """A pack of two documents, which has document ids with dropout."""
    ids = torch.arange(2, dtype=torch.int32) if dropout else None
    return TiledPack(cu_seqlens, cu_seqlens, schedule.q_tiles, schedule.k_tiles, ids)


def options_of(features):
    """The options that make a launch with these features."""
    dropout = features in ("all", "dropout")
    return AttentionOptions(
        softmax_scale=0.1,
        window_right=-1 if features == "full" else 0,
        window=torch.tensor([64, 0], dtype=torch.int32) if features == "all" else None,
        dropout_p=0.1 if dropout else 0.0,
        dropout_seed=torch.tensor([7]) if dropout else None,
        deterministic=features == "deterministic",
    )


@pytest.fixture
def launches(monkeypatch):
    """Keeps all kernels of varlen attention from being run: name -> Launches."""
    return launches_of(varlen, monkeypatch)


def launches_of(module, monkeypatch):
    """The same for any module of launchers."""
    monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    replaced = {}
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        replaced[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, replaced[name])
    return replaced


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 4, 6])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("features", aot.FEATURES)
def test_variants_are_what_is_launched(features, head_dim, group, dtype, launches):
    everything, dropout = features == "all", features in ("all", "dropout")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    tokens, heads = 300, aot.HEADS_KV * group
    q = torch.zeros(tokens, heads, head_dim, dtype=kind)
    k = torch.zeros(tokens, aot.HEADS_KV, head_dim, dtype=kind)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    pack = pack_of(cu, schedule, dropout)
    options = options_of(features)._replace(
        softcap=20.0 if everything else 0.0,
        learnable_sink=torch.zeros(heads) if everything else None,
    )
    out, lse = varlen.varlen_fwd(q, k, k, pack, options)
    variant = aot.forward_variant(head_dim, features=features, dtype=dtype, group=group)
    launches["varlen_fwd_hopper_kernel"].assert_described_by(variant)
    if head_dim > 128:
        return  # the portable kernels have this backward
    varlen.varlen_bwd(q, None, q, k, k, out, lse, pack, options)
    variant = aot.backward_variant(head_dim, features=features, dtype=dtype, group=group)
    launches["varlen_bwd_hopper_kernel"].assert_described_by(variant)


@pytest.fixture
def dual_chunk_launches(monkeypatch):
    """As launches, of dual chunk attention; its kernels that only rotate are left out."""
    monkeypatch.setattr(dual_chunk, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(dual_chunk, "dual_chunk_rotate", lambda *_, **__: None)
    monkeypatch.setattr(dual_chunk, "rotated_keys", lambda k, *_, **__: torch.empty_like(k))
    replaced = {}
    for name in [name for name in vars(dual_chunk) if name.endswith("_kernel")]:
        replaced[name] = Launches(getattr(dual_chunk, name))
        monkeypatch.setattr(dual_chunk, name, replaced[name])
    return replaced


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 4, 6])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("features", aot.DUAL_CHUNK_FEATURES)
def test_variants_of_dual_chunk_attention_are_what_is_launched(
    features, head_dim, group, dtype, dual_chunk_launches, monkeypatch
):
    dropout = features in ("all", "dropout")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    q = torch.zeros(300, aot.HEADS_KV * group, head_dim, dtype=kind)
    k = torch.zeros(300, aot.HEADS_KV, head_dim, dtype=kind)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    inv_freq = torch.zeros(head_dim // 2)
    logit_scale = torch.ones(2) if features == "all" else None
    operands = Operands(q, k, k, inv_freq, logit_scale, 40, 7)
    rotation = Rotation(inv_freq, 33, 7, 40)
    pack, options = pack_of(cu, schedule, dropout), options_of(features)
    out, lse = dual_chunk.dual_chunk_fwd(operands, rotation, pack, options)
    variant = aot.dual_chunk_forward_variant(head_dim, features=features, dtype=dtype, group=group)
    dual_chunk_launches["dual_chunk_fwd_hopper_kernel"].assert_described_by(variant)
    if features == "dropout":
        return  # the portable kernels have this backward
    kept = {}
    for relation in aot.DUAL_CHUNK_RELATIONS:
        kept[relation] = Launches(dual_chunk.dual_chunk_bwd_hopper_kernel.kernel)
    rest = iter(kept.values())
    monkeypatch.setattr(dual_chunk, "dual_chunk_bwd_hopper_kernel", EachLaunch(rest))
    dual_chunk.dual_chunk_bwd(q, None, operands, rotation, out, lse, pack, options)
    for relation, launched in kept.items():
        launched.assert_described_by(
            aot.dual_chunk_backward_variant(
                head_dim, features=features, dtype=dtype, group=group, relation=relation
            )
        )


class EachLaunch:
    """Stands for a kernel that is launched several times: a Launches for each."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return next(self.launches)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("dims", DIFFERENTIAL_COLUMNS, ids="D{0[0]}v{0[1]}-{0[2]}".format)
@pytest.mark.parametrize("features", [name for name in aot.FEATURES if name != "deterministic"])
def test_differential_variants_are_what_is_launched(features, dims, group, dtype, monkeypatch):
    launches = launches_of(differential, monkeypatch)
    head_dim, value_dim, shared_k = dims
    dropout = features in ("all", "dropout")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    schedule = make_schedule([200, 100])
    tokens, heads = 300, aot.HEADS_KV * group
    q = torch.zeros(tokens, heads, head_dim, dtype=kind)
    k = torch.zeros(tokens, aot.HEADS_KV, head_dim, dtype=kind)
    v = torch.zeros(tokens, aot.HEADS_KV, value_dim, dtype=kind)
    lam = torch.zeros(()).expand(tokens, heads)
    operands = (q, q, k, None if shared_k else k, v, lam)
    cu = torch.tensor([0, 200, 300], dtype=torch.int32)
    pack, options = pack_of(cu, schedule, dropout), options_of(features)
    out, *results = differential.differential_fwd(*operands, pack, options)
    described = {"features": features, "dtype": dtype, "group": group}
    variant = aot.differential_forward_variant(*dims, **described)
    launches["differential_fwd_hopper_kernel"].assert_described_by(variant)
    if features == "dropout" or (head_dim == 128 and not shared_k):
        return  # the portable kernels have this backward
    differential.differential_bwd(out, None, None, *operands, *results, pack, options)
    variant = aot.differential_backward_variant(*dims, **described)
    launches["differential_bwd_hopper_kernel"].assert_described_by(variant)
