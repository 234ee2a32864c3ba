"""Tests the planned peak at every layer against the bytes that a step holds there.

The MLP computes in tiles, and the difference allowed is half a tensor of hidden states, so one such
tensor too many anywhere fails.
"""

from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lctrain
from lctrain.config import AdapterConfig
from lctrain.loss import causal_lm_loss
from lctrain.memory import LayerCheckpoints
from lctrain.memory.layers import ATTENTION, HOST, INPUT, RECOMPUTE, LayerPolicy
from lctrain.memory.peaks import layer_peaks
from lctrain.memory.profile import profile
from lctrain.memory.store import HostStore
from lctrain.memory.tracker import Tracker
from lctrain.models.low_rank import add_adapter
from lctrain_kernels.gluon import support

TOKENS, TILE, WIDTH, LAYERS = 256, 32, 128, 9
POLICIES = {
    "checkpoint": "device/recompute " * 9,
    "attention-kept": "device/device " * 9,
    "offload": "host/recompute " * 7 + "device/recompute " * 2,
    "offload-attention": "host/host " * 9,
    "segment": "device/recompute recompute/recompute recompute/recompute " * 3,
    "segment-kept": "device/device recompute/device recompute/device " * 3,
    "segment-reused": "host/rebuilt recompute/rebuilt recompute/recompute " * 3,
    "segment-host": "host/host recompute/host recompute/host " * 3,
    "segment-inputs-kept": "device/host recompute/host recompute/host " * 3,
    "mixed": "host/rebuilt recompute/rebuilt recompute/recompute "
    "host/rebuilt recompute/host recompute/host "
    "host/device recompute/device device/device",
    "long-segments": "host/rebuilt recompute/recompute "
    "host/recompute recompute/host recompute/host recompute/host recompute/device "
    "device/device recompute/device",
}


@pytest.fixture(scope="module")
def model():
    """A patched Llama with adapters and few weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
    )
    pytest.importorskip("peft")
    model = LlamaForCausalLM(config)
    lctrain.patch_model(model, fused=True)
    return add_adapter(model, AdapterConfig(rank=1)).train()


@pytest.fixture(scope="module")
def bytes_of(model):
    """Bytes of a step in which attention's gradients are written in place, as on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "BACKWARD_LIMITS", ())  # such as float32
        patch.setattr(support, "may_be_planned", lambda: True)
        return profile(model, TOKENS, mlp_tokens=TILE)


def run_step(model, policies, by_head):
    """Runs a step, and returns the most bytes at each layer beyond weights and the host's arenas.

    The run that rebuilds the inputs of a segment counts at its last layer. The loss is left out.
    """
    attention = sum(policy.attention == HOST for policy in policies)
    counts = {
        INPUT: sum(policy.inputs == HOST for policy in policies),
        f"{ATTENTION} 2": attention,
        f"{ATTENTION} 3": attention,
    }
    store = HostStore(counts, tokens=TOKENS)
    inner = model.get_base_model()
    handle = LayerCheckpoints(inner, policies, store, TILE, by_head)
    few, batch = (
        lctrain.PackedBatch.from_documents([torch.arange(tokens) % 32]) for tokens in (8, TOKENS)
    )
    causal_lm_loss(model, few)[0].backward()  # makes gradients and arenas
    tracker = Tracker()
    tracker.ignore([*model.parameters(), *model.buffers()])
    tracker.ignore([arena._memory for some in store._arenas.values() for arena in some])
    phases = []  # of each run of a layer: [layer, most bytes until the next run begins]

    def begin(index, *given):
        if phases:
            phases[-1][1] = tracker.peak
        tracker.restart()
        phases.append([index, 0])

    layers = enumerate(inner.model.layers)
    hooks = [
        layer.input_layernorm.register_forward_pre_hook(partial(begin, index))
        for index, layer in layers
    ]
    with tracker:
        causal_lm_loss(model, batch)[0].backward()
    phases[-1][1] = tracker.peak
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    handle.remove()
    peaks = [peak for _, peak in phases[: LAYERS - 1]] + [0]  # the last phase has the loss
    waiting = 0
    left = LAYERS - 1  # the layer whose own backward comes next
    for position, (index, peak) in enumerate(phases[LAYERS:], LAYERS):
        waiting = max(waiting, peak)
        rebuilds = [one for one, _ in phases[position + 1 :]].count(index) > 0
        if not rebuilds:
            assert index == left
            peaks[index] = max(peaks[index], waiting)
            waiting, left = 0, left - 1
    assert left == -1
    return peaks


BY_HEAD = ("checkpoint", "segment-kept", "mixed")
CASES = [(name, False) for name in POLICIES] + [(name, True) for name in BY_HEAD]


@pytest.mark.parametrize(
    ("name", "by_head"),
    CASES,
    ids=[f"{name}-{'by-head' if by_head else 'all-heads'}" for name, by_head in CASES],
)
def test_the_peak_at_every_layer_is_within_5_percent_of_its_plan(name, by_head, model, bytes_of):
    policies = [LayerPolicy(*policy.split("/")) for policy in POLICIES[name].split()]
    assert policies[0].inputs != RECOMPUTE
    measured = bytes_of.by_head() if by_head else bytes_of
    planned = [peak + measured.around for peak in layer_peaks(measured.layers, policies)]
    taken = run_step(model, policies, by_head)
    hidden = measured.layers[0].inputs
    for index, (expected, found) in enumerate(zip(planned, taken, strict=True)):
        most = min(hidden // 2, found // 20)  # 5 %, as the guide says, and no tensor too many
        assert found - expected <= most, (index, planned, taken)
        # The first layer's input needs no gradient, so it may be freed before the peak.
        assert expected - found <= most or index == 0, (index, planned, taken)
