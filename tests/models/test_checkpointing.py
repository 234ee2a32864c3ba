"""Tests activation checkpointing of patched models: what is called again, and what is kept."""

import inspect
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lctrain
from lctrain.memory import use_policy
from tests.models.families import make_documents, make_model

LAYERS = 2


@pytest.fixture
def arguments():
    """A pack in transformers' format."""
    return lctrain.PackedBatch.from_documents(make_documents()).arguments()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kept_attention_runs_once_and_changes_no_bit(family, arguments) -> None:
    model = make_model(family).train()
    flops, gradients = [], []
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)  # the first call checks the head by calls of its own
        for keep in (True, False):
            use_policy(model, "checkpoint", keep_attention=LAYERS if keep else 0)
            model.zero_grad()
            with FlopCounterMode(display=False) as counter:
                model(**arguments).loss.backward()
            flops.append(counter.get_flop_counts()["Global"][torch.ops.lctrain.varlen_forward])
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert 0 < 2 * flops[0] == flops[1]
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_a_checkpoint_function_gets_one_hidden_state_per_layer(arguments) -> None:
    """Offloading of checkpoints and plans of memory rely on it."""
    model = make_model("llama").train()
    shapes = []

    def function(layer, *given, **options):
        shapes.append([tuple(x.shape) for x in given if isinstance(x, torch.Tensor)])
        return checkpoint(layer, *given, use_reentrant=False, **options)

    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)  # the first call checks the head by calls of its own
        use_policy(model)
        model._set_gradient_checkpointing(True, function)
        model(**arguments).loss.backward()
    tokens = arguments["input_ids"].shape[1]
    assert shapes == [[(1, tokens, model.config.hidden_size)]] * LAYERS


def test_every_other_layer_can_be_checkpointed(arguments) -> None:
    model = make_model("llama").train()
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False}, every_n_layers=2)
    calls = []
    with lctrain.patch_model(model, fused=True, loss=True):
        model(**arguments)  # the first call checks the head by calls of its own
        for layer in model.model.layers:
            layer.mlp.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
        model(**arguments).loss.backward()
    assert len(calls) == LAYERS + LAYERS // 2


@pytest.mark.gpu  # transformers pins memory
def test_offload_of_transformers_changes_no_gradient_and_gives_way_to_a_policy(arguments) -> None:
    """Its offload copies on the stream that computes; `use_policy` replaces it whole."""
    model = make_model("llama").train().cuda()
    arguments = {n: x.cuda() if torch.is_tensor(x) else x for n, x in arguments.items()}
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or "offload" not in inspect.signature(enable).parameters:
        pytest.skip("this transformers has no offload of its own")
    gradients = []
    with lctrain.patch_model(model, fused=True, loss=True):
        for offload in (False, True):
            enable({"use_reentrant": False}, offload=offload)
            model.zero_grad()
            model(**arguments).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        handle = use_policy(model)
        functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert all(function.func == handle.run for function in functions)


class Operators(TorchDispatchMode):
    """Records the names of lctrain's operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "lctrain":
            self.names.add(operator._schema.name.removeprefix("lctrain::"))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("family", "rotation"), [("llama", "rotary"), ("qwen3", "qk_norm_rotary"), ("gemma2", "rotary")]
)
def test_every_fused_operation_is_an_operator(family, rotation, arguments) -> None:
    """Selective checkpointing chooses among operators of torch.library only."""
    model = make_model(family).train()
    with lctrain.patch_model(model, fused=True, loss=True), Operators() as seen:
        model(**arguments).loss.backward()
    assert {"norm", rotation, "gated_linear", "varlen_forward"} <= seen.names
    assert any("cross_entropy" in name for name in seen.names)


def test_selective_checkpointing_can_keep_any_fused_operation(arguments) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model = make_model("qwen3").train()
    gradients = []
    for kept in (None, "norm", "qk_norm_rotary", "gated_linear"):

        def choose(context, operator, *args, kept=kept, **kwargs):
            wanted = getattr(torch.ops.lctrain, kept).default if kept else None
            same = operator is wanted
            return CheckpointPolicy.MUST_SAVE if same else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = partial(create_selective_checkpoint_contexts, choose)
        with lctrain.patch_model(model, fused=True, loss=True):
            use_policy(model)
            model._set_gradient_checkpointing(
                True, partial(checkpoint, use_reentrant=False, context_fn=contexts)
            )
            model.zero_grad()
            model(**arguments).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))
