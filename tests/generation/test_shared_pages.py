"""Tests decode steps that read shared pages once: when they do, and that the results stay."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

import lctrain
import lctrain_kernels
from lctrain.attention.forward import SPEC_ATTRIBUTE
from lctrain.attention.spec import FlashSpec
from lctrain.generation import decode
from lctrain.generation.continuous import ContinuousBatch
from lctrain.generation.forward import CachedForward
from lctrain.generation.options import SamplingOptions
from lctrain.generation.pages import PAGE, CacheShape, PagePool
from lctrain.generation.road import find_cache
from lctrain.generation.shared_pages import (
    PrefixBounds,
    PrefixBuffers,
    SharedPages,
    bounds_of,
    pays,
)
from lctrain.generation.task import GenerationTask
from lctrain.kernels import make_shared_prefixes
from tests.generation.test_decode_step import Recording
from tests.numerics import assert_error_at_most_twice

START = [index % 90 for index in range(2 * PAGE)]
# Two groups share two pages and one page; the fifth prompt shares none.
PROMPTS = [[*START, 5], [*START, 6, 7], [*START[5:], *START[:9]], [*START[5:], 8], [9, 10]]
MEASURED = CacheShape(1, 8, 128, torch.bfloat16)  # that of bench/results/decode/*-prefix.json


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def groups(*sizes):
    """Returns prefixes of groups, each (members, tokens)."""
    table = [(0, members, prefix) for members, prefix in sizes]
    most, longest = (max(column) for column in zip(*sizes, strict=True))
    return SimpleNamespace(groups=torch.tensor(table), most=most, longest=longest)


@pytest.fixture
def make(patched):
    """Returns a factory of ContinuousBatch on four samples of the prompts: make(sharing)."""

    def make(sharing, prompts=PROMPTS, capture=None, model=patched, **sizes):
        sizes = {"samples": 1, "max_new_tokens": 6, "batch_size": 64} | sizes
        count = len(prompts) * sizes["samples"]
        task = GenerationTask(
            prompts, range(count), SamplingOptions(), sizes.pop("max_new_tokens"), **sizes
        )
        return ContinuousBatch(model, task, find_cache(model), None, capture, sharing)

    with torch.no_grad():
        yield make


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(16, 16384)], True),
        ([(64, 16384)], True),
        ([(3, 16384)], True),
        ([(2, 16384)], False),
        ([(2, 131072)], True),
        ([(64, 512)], True),
        ([(16, 512)], False),
        ([(16, 512)] * 4, True),
    ],
)
def test_sharing_pays_if_its_reads_outweigh_its_kernel(sizes, expected):
    assert pays(groups(*sizes), MEASURED) is expected


def test_fewer_bytes_of_a_token_save_less():
    assert not pays(groups((4, 16384)), MEASURED._replace(heads=1))


def test_bounds_are_few():
    assert bounds_of(groups((2, 64)), 4) == PrefixBounds(1, 4, 1024)
    assert bounds_of(groups((16, 1088)), 16) == PrefixBounds(1, 16, 2048)
    assert bounds_of(groups(*[(5, 16384)] * 3, (2, 64)), 64) == PrefixBounds(4, 16, 16384)
    assert bounds_of(groups((2, 64), (2, 64)), 4) == PrefixBounds(2, 4, 1024)
    assert bounds_of(groups((2, 64)), 2) == PrefixBounds(1, 2, 1024)


def test_buffers_hold_the_groups_of_a_batch():
    bounds, size = PrefixBounds(2, 4, 1024), 4
    host = torch.full((PrefixBuffers.numbers(size, bounds),), 9, dtype=torch.int32)
    buffers = PrefixBuffers(host, host, size, bounds)
    buffers.fill(make_shared_prefixes([[0, 1], [2, 3], [0, 4]], [120] * 3, PAGE))
    found = buffers.prefixes
    assert found.prefix.tolist() == [64, 0, 64, 0]
    assert found.members.tolist() == [0, 2, 0, 0]
    assert found.groups.tolist() == [[0, 2, 64], [0, 0, 0]]
    assert (found.longest, found.most) == (1024, 4)


def test_auto_shares_on_a_gpu_only():
    pool = PagePool(CacheShape(1, 2, 8, torch.float32), 2, torch.device("cpu"))
    pages = pool.take(1)
    pool.share(pages)
    table = torch.full((2, 1), pages[0], dtype=torch.int32)
    arguments = (0, [PAGE] * 2, table)
    assert SharedPages("auto", pool, torch.device("cpu")).find(*arguments) is None
    assert SharedPages("never", pool, torch.device("cuda")).find(*arguments) is None
    assert SharedPages("auto", pool, torch.device("cuda")).find(*arguments) is None  # too few bytes
    found = SharedPages("always", pool, torch.device("cpu")).find(*arguments)
    assert found.groups.tolist() == [[0, 2, PAGE]]
    pool.release(pages)
    assert SharedPages("always", pool, torch.device("cpu")).find(*arguments) is None


@pytest.mark.parametrize("batch_size", [64, 7, 3])
def test_completions_are_those_without_sharing(make, batch_size):
    """Requests come, fork and go. On a CPU, every step checks its groups against the page table."""
    sizes = {"samples": 2, "batch_size": batch_size}
    never = make("never", **sizes)
    expected = never.run()
    always = make("always", **sizes)
    assert tokens(always.run()) == tokens(expected)
    assert never.shared_steps == 0 < always.shared_steps


def test_a_full_cache_changes_the_groups(make):
    """A request that gives its pages up leaves its group, and joins it with other pages."""
    sizes = {"prompts": [[*START, *[5] * 62], [*START, *[6] * 62]], "max_new_tokens": 68}
    expected = make("never", **sizes).run()
    small = make("always", **sizes)
    small._pool._free = small._pool._free[-6:]  # a request ends with 5 pages, 2 of them shared
    assert tokens(small.run()) == tokens(expected)
    assert small.schedule.preempted > 0 < small.shared_steps


def test_captured_steps_read_the_groups_of_their_batch(make, monkeypatch):
    """Steps with and without shared prefixes are captured apart; a replay takes new groups."""
    monkeypatch.setattr(decode, "WARM_UP", 1)
    prompts = [*PROMPTS[:4], [*START, 1], [*START, 2], [3], [4], [5]]
    expected = tokens(make("never", prompts=prompts, batch_size=4).run())
    capture = Recording()
    found = make("always", prompts=prompts, batch_size=4, capture=capture)
    assert tokens(found.run()) == expected
    two, one = (PrefixBounds(groups, 4, 1024) for groups in (2, 1))
    assert set(found._decoders) == {(4, two), (4, one), (1, None)}
    assert found.shared_steps < found.steps
    assert capture.replays > 0


def test_layers_with_a_window_share_nothing(endless, make, monkeypatch):
    """A window is shorter than most prefixes: such a layer would read keys that no query sees."""
    model = endless(num_hidden_layers=2)
    lctrain.patch_model(model)
    layer = model.model.layers[1].self_attn
    setattr(layer, SPEC_ATTRIBUTE, FlashSpec(sliding_window=5))
    seen = []
    original = lctrain_kernels.flash_attn_with_kvcache

    def remembered(*tensors, plan, window_size, **options):
        seen.append((plan.shared is None, window_size[0] >= 0))
        return original(*tensors, plan=plan, window_size=window_size, **options)

    monkeypatch.setattr(lctrain_kernels, "flash_attn_with_kvcache", remembered)
    make("always", model=model, prompts=PROMPTS[:2]).run()
    assert set(seen) == {(False, False), (True, True)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs without a GPU only")
def test_kernels_read_a_prefix_once(endless, make, monkeypatch):
    """The portable kernels, under the interpreter without a GPU; the prefill is PyTorch's."""
    from lctrain_kernels.decode import launch, plan

    model = endless(num_hidden_layers=1)
    lctrain.patch_model(model)
    sizes = {"prompts": [PROMPTS[0], PROMPTS[1], PROMPTS[4]], "model": model, "max_new_tokens": 2}
    logits = []
    forward = CachedForward.__call__

    def listened(*arguments):
        logits.append(forward(*arguments))
        return logits[-1]

    batches = [make(sharing, **sizes) for sharing in ("never", "always")]
    monkeypatch.setattr(CachedForward, "__call__", listened)
    apart = batches[0].run()
    monkeypatch.setattr(plan, "select_backend", lambda *_, **__: "triton")
    attend = lctrain_kernels.flash_attn_with_kvcache
    monkeypatch.setattr(
        lctrain_kernels,
        "flash_attn_with_kvcache",
        lambda *tensors, **options: attend(*tensors, **options | {"backend": "triton"}),
    )
    launched = []
    original = launch.launch

    def remembered(kernel, grid):
        launched.append(kernel.__name__)
        return original(kernel, grid)

    monkeypatch.setattr(launch, "launch", remembered)
    shared = batches[1].run()
    assert launched.count("decode_prefix_kernel") == 1
    assert tokens(shared) == tokens(apart)
    model.double()
    rows = [torch.tensor([[*one.prompt_ids, *one.token_ids[:-1]]]) for one in apart]
    exact = torch.stack([model(row).logits[0, -1] for row in rows])
    _, plain, _, found = logits  # of the prefill and of the step, twice
    assert_error_at_most_twice(found, plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash", "dual_chunk", "differential"])
def test_graphs_of_shared_steps_change_no_bit(endless, attention):
    """Samples of long prompts end one after another, so groups shrink and other graphs serve."""
    model = endless(head_dim=64, max_position_embeddings=4096)
    if attention == "differential":
        model = DiffLlamaForCausalLM(DiffLlamaConfig(**model.config.to_diff_dict())).eval()
    model.to("cuda", torch.bfloat16)
    chunks = {"chunk_size": 900, "local_size": 100} if attention == "dual_chunk" else {}
    lctrain.patch_model(model, attention, fused=attention != "differential", **chunks)
    long = [index % 90 for index in range(2100)]
    prompts, options = [long, long[300:], [5, 6]], {"samples": 6, "max_new_tokens": 60}
    options |= {"eos_token_id": list(range(4)), "batching": "continuous"}

    def complete(sharing, graphs):
        return lctrain.generate(
            model, prompts, shared_prefixes=sharing, cuda_graphs=graphs, **options
        )

    captured = complete("always", True)
    assert captured == complete("always", False)
    apart = complete("never", True)
    assert apart == complete("never", False)
    for one, other in zip(captured, apart, strict=True):
        alike = sum(a == b for a, b in zip(one.token_ids, other.token_ids, strict=False))
        assert alike > 0
