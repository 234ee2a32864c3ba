"""Tests decode steps over static buffers: padded batches, captured steps, and refused captures."""

import warnings
from contextlib import nullcontext
from itertools import count
from weakref import WeakSet

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lctrain
from lctrain.generation import decode, graph
from lctrain.generation.continuous import complete_continuously
from lctrain.generation.decode import batch_sizes
from lctrain.generation.forward import CachedForward
from lctrain.generation.graph import LEAST_FREE, GraphCapture, capture_refusal
from lctrain.generation.options import SamplingOptions
from lctrain.generation.road import find_cache
from lctrain.generation.task import GenerationTask
from lctrain.transfer import HostCopy
from tests.models.attentions import ATTENTIONS, patched_model

WARM_UP = 2
FILTERS = {"top_k": 40, "top_p": 0.9, "min_p": 0.001, "repetition_penalty": 1.2}
PROMPTS = [[5, 6, 7], [8] * 63, [9, 10], [11, 12, 13, 14], [15]]


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    """Captures the second step of a size, also in short completions."""
    monkeypatch.setattr(decode, "WARM_UP", WARM_UP)


class Recording:
    """Stands for GraphCapture: a replay runs the function again, and fills the same tensor."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function):
        self.captures += 1
        result = function()

        def replay() -> None:
            self.replays += 1
            result.copy_(function())

        return replay, result


def tokens(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def test_sizes_of_batches():
    assert batch_sizes(1) == [1]
    assert batch_sizes(2) == [1, 2]
    assert batch_sizes(4) == [1, 4]
    assert batch_sizes(64) == [1, 4, 16, 64]
    assert batch_sizes(48) == [1, 4, 16, 48]


def test_captured_steps_give_the_same_tokens(make_batch):
    expected = tokens(make_batch(PROMPTS).run())
    capture = Recording()
    captured = make_batch(PROMPTS, capture=capture)
    assert tokens(captured.run()) == expected
    assert (capture.captures, capture.replays) == (1, captured.steps - WARM_UP)


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_read(make_batch, monkeypatch):
    order = []

    def watch(owner, name, word):
        original = getattr(owner, name)

        def watched(*arguments):
            order.append(word)
            return original(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(decode.DecodeStep, "__call__", "launch")
    watch(HostCopy, "wait", "read")
    make_batch(PROMPTS, max_new_tokens=5).run()
    # The tokens of the prefill are read first.
    assert order == ["launch", "read"] * 4 + ["read"]


def test_no_step_waits_for_the_device(make_batch, monkeypatch):
    """Around the model, it takes no number out of a tensor, nor a size that depends on values."""

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
            return func(*args, **(kwargs or {}))

    for choice in ({"temperature": 0}, FILTERS):
        batch = make_batch(PROMPTS, max_new_tokens=4, **choice)
        batch._prefill(batch.schedule.admit())
        with monkeypatch.context() as patch, Waits():
            patch.setattr(CachedForward, "__call__", lambda *_: torch.ones(len(PROMPTS), 97))
            batch._decode()
        assert len(batch._unread) == 2


def test_each_size_is_captured_once(make_batch):
    prompts = [[index + 1] for index in range(9)]  # a batch of 4, another, and one of 1
    capture = Recording()
    found = make_batch(prompts, capture=capture, batch_size=4)
    assert tokens(found.run()) == tokens(make_batch(prompts).run())
    assert capture.captures == 2
    assert capture.replays == found.steps - 2 * WARM_UP


def test_the_last_step_is_not_captured(make_batch):
    capture = Recording()
    expected = tokens(make_batch(PROMPTS, max_new_tokens=WARM_UP + 1).run())
    found = make_batch(PROMPTS, capture=capture, max_new_tokens=WARM_UP + 1).run()
    assert tokens(found) == expected
    assert capture.captures == 0


def test_a_step_is_captured_before_earlier_tokens_are_read(make_batch, monkeypatch):
    """The host captures while the device works on the prefill."""
    monkeypatch.setattr(decode, "WARM_UP", 1)
    order = []
    capture = Recording()
    wait = HostCopy.wait
    monkeypatch.setattr(HostCopy, "wait", lambda copy: order.append("read") or wait(copy))

    def noted(function):
        order.append("capture")
        return capture(function)

    make_batch(PROMPTS, capture=noted).run()
    assert order[:2] == ["capture", "read"]
    assert order.count("capture") == 1


def test_a_capture_that_fails_is_given_up_with_its_reason(make_batch):
    attempts = []

    def refuse(function):
        attempts.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    expected = tokens(make_batch(PROMPTS).run())
    with pytest.warns(UserWarning, match="got the error 'operation not permitted when stream is"):
        assert tokens(make_batch(PROMPTS, capture=refuse).run()) == expected
    assert len(attempts) == 1


def test_an_error_of_a_step_that_is_not_captured_is_raised(make_batch, patched):
    batch = make_batch(PROMPTS, capture=Recording())

    def fail(*_):
        raise RuntimeError("broken")

    batch._prefill(batch.schedule.admit())
    patched.lm_head.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        batch.run()


def test_an_error_of_a_step_that_is_to_be_captured_is_raised(make_batch, patched, monkeypatch):
    monkeypatch.setattr(decode, "WARM_UP", 1)
    capture, calls = Recording(), []
    batch = make_batch(PROMPTS, capture=capture)

    def fail(*_):
        calls.append("step")
        raise RuntimeError("out of memory")

    batch._prefill(batch.schedule.admit())
    patched.lm_head.register_forward_hook(fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="out of memory"):
            batch.run()
    assert (calls, capture.captures) == (["step"], 0)


def test_graphs_of_a_device_are_recorded_on_one_stream(monkeypatch):
    """cuBLAS keeps a workspace for each stream, so a new one per call would take more and more."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: [device])
    first, again, other = (graph.capture_stream(torch.device("cuda", n)) for n in (98, 98, 99))
    graph.capture_stream.cache_clear()
    assert first is again
    assert (first, other) == ([torch.device("cuda", 98)], [torch.device("cuda", 99)])


def test_models_that_a_graph_cannot_replay(patched):
    assert capture_refusal(patched) == "weights on cpu"
    patched.lm_head._hf_hook = object()
    assert capture_refusal(patched) == "weights of lm_head that accelerate moves in every forward"
    patched.model.register_forward_pre_hook(lambda *_: None)
    assert capture_refusal(patched) == "a hook of tests in every forward of model"


def test_a_refused_capture_warns(patched, monkeypatch):
    """On a CPU nothing is captured, so the weight's device is feigned."""

    class Weight:
        device = torch.device("cuda")

    task = GenerationTask([[5]], [0], SamplingOptions(), 2)
    shape = find_cache(patched)
    weights = list(patched.parameters())
    calls = iter([[Weight()]])
    monkeypatch.setattr(patched, "parameters", lambda: iter(next(calls, weights)))
    match = "need a forward pass that only launches .* got weights"
    with pytest.warns(UserWarning, match=match), torch.no_grad():
        found = complete_continuously(patched, task, shape)
    assert len(found[0].token_ids) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("attention", "choice"),
    [("flash", {}), *((attention, FILTERS) for attention in ATTENTIONS)],
)
def test_cuda_graphs_change_no_bit_and_no_random_state(endless, attention, choice):
    with patched_model(endless(head_dim=64), attention, fused=attention == "flash") as model:
        _check_graphs(model.to("cuda", torch.bfloat16), choice)


def _check_graphs(model, choice):
    options = {"max_new_tokens": 80, "seeds": 1, "batch_size": 3, "batching": "continuous"}
    options |= choice

    def complete() -> list:
        return [lctrain.generate(model, PROMPTS, cuda_graphs=x, **options) for x in (True, False)]

    captured, eager = complete()
    assert captured == eager
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    used = torch.cuda.memory_allocated()  # cuBLAS has its workspaces now
    assert complete() == [captured, eager]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert torch.cuda.memory_allocated() == used


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_and_the_device():
    stream = torch.cuda.current_stream()
    capture = GraphCapture(torch.device("cuda", torch.cuda.current_device()))
    ones = torch.ones(3, device="cuda")
    state, reserved = torch.cuda.get_rng_state(), torch.cuda.memory_reserved()
    with pytest.raises(RuntimeError, match="captur"):  # and no error of the recovery
        capture(lambda: torch.full_like(ones, ones.sum().item()))
    assert torch.cuda.current_stream() == stream
    assert ones.sum().item() == 3
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(3, device="cuda")  # fails while the generator is in its mode of captures
    replay, doubled = capture(lambda: ones * 2)
    replay()
    assert doubled.tolist() == [2.0] * 3

    # While the allocator thinks that a capture runs, it keeps blocks that other streams have used.
    size = 2**26
    other = torch.cuda.Stream()
    for _ in range(3):
        used = torch.empty(size, dtype=torch.uint8, device="cuda")
        used.record_stream(other)
        del used
    torch.cuda.synchronize()
    torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < reserved + size


@pytest.mark.parametrize(
    ("open_pool", "free"),
    [(True, 2**33), (False, 2**33), (True, 2**20)],
    ids=["", "closed", "full"],
)
def test_a_capture_that_fails_ends_the_mode_of_captures(monkeypatch, open_pool, free):
    """The calls of torch in their order; the end of the failed capture raises, as in torch."""
    begin = ["empty", "begin"] if free < LEAST_FREE else ["begin"]
    calls, recording, pools, fails = [], set(), count(1), ["once"]
    graphs_of = {}  # pool -> its graphs, as long as something refers to them

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert capture_error_mode == "thread_local"
            assert pool not in recording  # torch's allocator of pinned memory refuses it
            assert pool not in graphs_of or graphs_of[pool]  # and its allocator, if all are gone
            graphs_of.setdefault(pool, WeakSet()).add(self)
            self.pool = pool
            recording.add(pool)
            calls.append("begin")

        def capture_end(self):
            calls.append("end")
            if fails:
                fails.clear()
                raise RuntimeError("the capture was invalidated")
            recording.remove(self.pool)

        def replay(self):
            calls.append("replay")

    def end_pool(index, pool):
        assert (index, pool) == (3, (0, 1))
        calls.append("end pool")
        if not open_pool:
            raise RuntimeError("not currently recording to mempool_id")

    zeros = torch.zeros
    stubs = {
        "graph_pool_handle": lambda: (0, next(pools)),
        "device": nullcontext,
        "CUDAGraph": Graph,
        "stream": lambda stream: nullcontext(),
        "mem_get_info": lambda device: (free, 2**34),
        "empty_cache": lambda: calls.append("empty"),
        "current_stream": lambda: "stream",
        "set_stream": calls.append,
        "get_rng_state": lambda device: "state",
        "set_rng_state": lambda state, device: calls.append((state, str(device))),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(graph, "capture_stream", str)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    capture = GraphCapture(torch.device("cuda", 3))
    with pytest.raises(RuntimeError, match="invalidated"):
        capture(lambda: 1 / 0)
    recovery = ["stream", "end pool", *begin, "end", ("state", "cuda:3"), "stream"]
    assert calls == [*begin, "end", *recovery]
    calls.clear()
    replay, result = capture(lambda: "result")
    replay()
    assert (calls, result) == ([*begin, "end", "replay"], "result")
    capture = GraphCapture(torch.device("cuda", 3))
    for _ in range(2):  # the graph of the first capture is gone when the second begins
        capture(lambda: "result")
