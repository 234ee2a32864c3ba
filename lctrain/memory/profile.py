"""profile: counts the bytes of a training step, layer by layer, on the meta device.

Tensors on the meta device have shapes and dtypes but no memory, so neither a GPU nor weights are
needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lctrain.batch import PackedBatch
from lctrain.experts import experts_per_token
from lctrain.memory.alike import structure
from lctrain.memory.attention import KeptResults
from lctrain.memory.compiled import compiled_layers, is_compiled_around
from lctrain.memory.experts import elements, group_experts
from lctrain.memory.layers import checkpointed_layers
from lctrain.memory.optimizer import ADAMW, optimizer_bytes
from lctrain.memory.quantized import weight_bytes
from lctrain.memory.tiles import TiledMLPs
from lctrain.memory.tracker import (
    Bfloat16Products,
    Tracker,
    skeleton,
    torch_autocast_takes_meta,
)
from lctrain.models.low_rank import leave_casts_to_autocast
from lctrain_kernels.autocast import autocast_on_meta
from lctrain_kernels.cross_entropy.chunks import ACCELERATOR_CHUNK_BYTES, pick_chunk_tokens
from lctrain_kernels.gluon.support import planned_memory
from lctrain_kernels.in_place import inputs_rebuilt

PRECISIONS = ("true", "bf16-mixed")


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one decoder layer in a training step.

    Attributes:
        inputs: Bytes of the layer's input, its hidden states.
        attention: Bytes of the outputs and the lse of the layer's attention.
        saved: Bytes that autograd saves for the layer's backward without activation checkpointing.
        forward: Peak bytes of the layer's forward under checkpointing, without the layer's input.
        backward: Peak bytes of the layer's recomputation and backward, without the layer's input.
        by_head: The same if attention's backward runs one key/value head at a time.
        beside: The same if attention's backward overwrites none of its inputs, as it does without
            activation checkpointing.
        gradients: Bytes of the gradients of the layer's trained weights.
    """

    inputs: int
    attention: int
    saved: int
    forward: int
    backward: int
    by_head: int
    beside: int
    gradients: int = 0


@dataclass(frozen=True)
class Profile:
    """Bytes of a training step in which every decoder layer is checkpointed.

    Attributes:
        tokens: Number of tokens of the pack.
        weights: Bytes of weights and buffers.
        gradients: Bytes of the gradients of the trained weights.
        head_gradients: Those of the output projection, which the backward computes first.
        accumulates: Whether gradients of earlier micro-batches exist during the step. Otherwise the
            backward adds the gradients of one layer after the other.
        optimizer: Bytes of the optimizer's states on the GPU.
        host: Bytes of the optimizer's states on the host.
        layers: Bytes of every layer.
        around: Bytes of tensors outside of the layers that exist during the whole step.
        head: Peak bytes between the last layer's forward and its backward: the final norm, and the
            gradient of the norm's output.
        loss: Bytes of one chunk of logits, and of the float32 gradient of the output embedding if
            it is trained.
        attention_operations: Floating-point operations of a layer's attention in the forward.
        other_operations: Floating-point operations of a layer's matrix products in the forward.
        trained_operations: Those of a layer's weight gradients.
        tile_operations: Those of a layer's MLP, if its tiles run twice in the backward: in the
            layer's recomputation, and one by one.
        head_operations: Those of the output projection in the loss.
        head_dim: Columns of a head of the attention's outputs; 0 if it is not lctrain's.
        in_bfloat16: Whether matrix products are in bfloat16.
        compiled: Whether torch.compile compiles the code that calls the layers.
        on_gpu: Whether the step runs on a GPU, whose allocator and CUDA take memory beside tensors.
    """

    tokens: int
    weights: int
    gradients: int
    optimizer: int
    host: int
    layers: tuple[LayerBytes, ...]
    around: int
    head: int
    loss: int
    attention_operations: float
    other_operations: float
    trained_operations: float = 0.0
    tile_operations: float = 0.0
    head_operations: float = 0.0
    head_dim: int = 0
    in_bfloat16: bool = False
    compiled: bool = False
    on_gpu: bool = True
    head_gradients: int = 0
    accumulates: bool = False

    def by_head(self) -> Profile:
        """Returns the bytes if attention's backward runs one key/value head at a time."""
        layers = tuple(replace(layer, backward=layer.by_head) for layer in self.layers)
        return replace(self, layers=layers)


def profile(
    model: nn.Module,
    tokens: int,
    precision: str = "true",
    mlp_tokens: int | None = None,
    quantize: str | None = None,
    optimizer: str = ADAMW,
    device_limit: int | None = None,
) -> Profile:
    """Runs forward and backward of a model on the meta device, and counts the bytes.

    The loss is assumed to be `lctrain.loss.causal_lm_loss`, which computes logits in chunks.

    Args:
        model: A transformers causal LM, or a PeftModel around one, patched or not, on any device.
        tokens: Number of tokens of the pack, which is one document.
        precision: "true" if activations have the dtype of the weights, or "bf16-mixed".
        mlp_tokens: Number of tokens that an MLP computes at a time; None for all tokens at once.
        quantize: Format in which frozen dense weights will be stored: nf4, int8 or None.
        optimizer: Dotted name of the optimizer's class.
        device_limit: Memory of the GPU in bytes; None if it is unknown. Where no GPU is, it tells
            whether the Hopper kernels, which take less memory, may run.

    Raises:
        ValueError: if transformers cannot checkpoint the model's layers, or the model reads values
            of its weights.
    """
    weights, dequantized = weight_bytes(model, quantize)
    given = checkpointed_layers(model)
    compiled, around = compiled_layers(model, given), is_compiled_around(model, given)
    model = skeleton(model).train()
    group_experts(model)
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder = inner.base_model if hasattr(inner, "base_model") else inner
    if precision == "bf16-mixed":
        leave_casts_to_autocast(model)
    layers = checkpointed_layers(decoder)
    if not layers:
        raise ValueError(
            f"model must have layers that transformers can checkpoint, got {type(inner).__name__}. "
            "Its memory cannot be planned."
        )
    if mlp_tokens is not None:
        TiledMLPs(layers, mlp_tokens)
    try:
        with planned_memory(device_limit):
            plain = _Run(decoder, tokens, precision, checkpointed=False).layers
            last = len(plain) - 1
            run = _Run(decoder, tokens, precision, checkpointed=True, last=last, compiled=compiled)
    except (NotImplementedError, RuntimeError) as error:
        text = inner.config.get_text_config()
        remedy = "Patch it by lctrain.patch_model before it is planned."
        if str(text._attn_implementation).startswith("lctrain_"):
            remedy = (
                "Set memory=checkpoint or offload, which need no plan, or other adapter.targets."
            )
        raise ValueError(
            f"model must run without its weights to be planned, got {type(inner).__name__}, which "
            f"does not: {str(error).splitlines()[0].rstrip('.')}. {remedy}"
        ) from error
    tiled = 0.0
    if mlp_tokens is not None and mlp_tokens < tokens and run.repeats_mlps:
        tiled = sum(elements(layer.mlp) for layer in layers if hasattr(layer, "mlp"))
    head = _head_weight(inner)
    chosen = [experts_per_token(inner.config, index) for index in range(len(layers))]
    multiplied = sum(map(elements, layers, chosen)) / len(layers)
    trained_part = sum(elements(x, one, True) for x, one in zip(layers, chosen, strict=True))
    dtype = next(layers[0].parameters()).dtype
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(map(_bytes, trained))
    on_device, on_host = optimizer_bytes(trained, optimizer)
    return Profile(
        tokens=tokens,
        weights=weights,
        gradients=gradients,
        optimizer=on_device,
        host=on_host,
        layers=tuple(
            LayerBytes(
                inputs=one.inputs,
                attention=one.attention,
                saved=whole.saved,
                forward=one.forward + dequantized,
                backward=one.backward + dequantized,
                by_head=one.by_head + dequantized,
                beside=one.beside + dequantized,
                gradients=sum(_bytes(p) for p in layer.parameters() if p.requires_grad),
            )
            for one, whole, layer in zip(run.layers, plain, layers, strict=True)
        ),
        around=run.around,
        head=run.head,
        loss=_loss_bytes(inner, tokens, precision),
        # q k and p v take 2 operations for each of T^2 / 2 pairs and each column.
        attention_operations=2 * tokens * sum(x.outputs for x in run.layers) / len(layers),
        other_operations=2 * tokens * multiplied,
        trained_operations=2 * tokens * trained_part / len(layers),
        tile_operations=2 * tokens * tiled / len(layers),
        head_operations=2 * tokens * _head_passes(head) * (0 if head is None else head.numel()),
        head_dim=max(layer.head_dim for layer in run.layers),
        compiled=around,
        in_bfloat16=precision == "bf16-mixed" or dtype == torch.bfloat16,
        head_gradients=0 if head is None or not head.requires_grad else _bytes(head),
    )


class _Layer:
    """Measured bytes of one layer; LayerBytes describes the fields."""

    def __init__(self) -> None:
        self.inputs = self.attention = self.saved = self.forward = self.backward = 0
        self.by_head = self.beside = 0
        self.outputs = self.head_dim = 0  # elements and columns of its attention's outputs


class _Run:
    """Runs a decoder's forward on the meta device, and with checkpointing also its backward.

    Layers of the same structure take the same bytes. One of them runs, and the last layer, whose
    first gradients belong to the head.

    Attributes:
        tracker: Counter of the bytes of live tensors.
        layers: Measured bytes of each layer.
        around: Bytes of live tensors before the first layer, without the layer's input.
        head: Peak bytes between the last layer's forward and its backward.
        repeats_mlps: Whether the recomputation of a layer runs its MLP to the end.
    """

    def __init__(
        self,
        decoder: Any,
        tokens: int,
        precision: str,
        checkpointed: bool,
        last: int = -1,
        compiled: Sequence[bool] = (),
    ) -> None:
        self.tracker = Tracker()
        self.layers: list[_Layer] = []
        self.around = self.head = 0
        self.repeats_mlps = False
        self._modules = checkpointed_layers(decoder)
        self._checkpointed = checkpointed
        self._number_of_last = last
        self._compiled = tuple(compiled) or (False,) * len(self._modules)
        self._mixed = precision == "bf16-mixed"
        # Structure of a layer whose output is like its input -> its bytes, and whether it returns
        # a tuple.
        self._kinds: dict[Any, tuple[_Layer, bool]] = {}
        self._casts: dict[int, Tensor] = {}  # bfloat16 copies of weights, as in autocast's cache
        if self._mixed and checkpointed:
            # The backward recomputes an MLP's tile outside of the modes that `call` enters below.
            for tiled in [module for module in decoder.modules() if "forward" in vars(module)]:
                for module in tiled.modules():
                    if isinstance(module, nn.Linear):
                        vars(module)["forward"] = partial(self._linear, module)
        self._last: tuple[str, int, int] | None = None  # phase, layer, live bytes at its start
        decoder._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
        for layer in self._modules:
            layer._gradient_checkpointing_func = self._layer
        pack = PackedBatch.from_documents([torch.zeros(tokens, dtype=torch.int64)])
        batch = pack.to("meta").model_kwargs()
        self.tracker.ignore([*decoder.parameters(), *decoder.buffers()])
        with ExitStack() as stack:
            stack.enter_context(torch.device("meta"))
            dtype = torch.bfloat16 if self._mixed else None
            stack.enter_context(torch_autocast_takes_meta())
            stack.enter_context(autocast_on_meta(dtype))
            stack.enter_context(self.tracker)
            hidden = decoder(**batch)[0]
            self._casts = {}
            gradient = torch.empty_like(hidden)
            if checkpointed:
                hidden.backward(gradient)
                self._close()

    def _layer(self, layer: Any, *given: Any, **options: Any) -> Any:
        x = given[0]
        index = len(self.layers)
        kind = structure((layer, given, options)), self._compiled[index]
        if kind in self._kinds and index != self._number_of_last:
            measured, is_tuple = self._kinds[kind]
            self.layers.append(measured)
            out = x.clone()  # passes the gradient on
            if self._checkpointed:
                self._open("head", index)
            return (out,) if is_tuple else out
        measured = _Layer()
        measured.inputs = _bytes(x)
        self.layers.append(measured)
        found = self._run(measured, index, layer, given, options)
        is_tuple = isinstance(found, tuple) and len(found) == 1
        out = found[0] if is_tuple else found
        if isinstance(out, Tensor) and structure(out) == structure(x):
            self._kinds[kind] = measured, is_tuple
        return found

    def _run(self, measured: _Layer, index: int, layer: Any, given: Any, options: Any) -> Any:
        """Runs a layer, and measures its bytes. Returns the layer's output."""
        self._open("forward", index)
        begin = self.tracker.live
        if not self._checkpointed:
            with self._precision():
                found = layer(*given, **options)
            out = found[0] if isinstance(found, tuple) else found
            measured.saved = self.tracker.live - begin - _bytes(out)
            return found
        results = KeptResults(lambda result: (_bytes(result), *_outputs(result)))
        recording, _ = results.contexts()
        calls = []

        def call(*args: Any, **named: Any) -> Any:
            calls.append(index)
            if len(calls) == 1:
                rebuilt = nullcontext() if self._compiled[index] else inputs_rebuilt()
                with recording, rebuilt, self._precision():
                    return layer(*args, **named)
            self._casts = {}
            if self._last is None or self._last[:2] != ("backward", index):
                self._open("backward", index)
            with self._precision(), self._watched(self._modules[index]):
                return layer(*args, **named)

        found = checkpoint(call, *given, use_reentrant=False, **options)
        out = found[0] if isinstance(found, tuple) else found
        if isinstance(out, Tensor) and out.requires_grad:
            # A layer's backward may begin before its recomputation, as that of a sum over experts.
            out.register_hook(lambda _: self._open("backward", index))
        sizes = [size for call in results.calls for size in call]
        measured.attention = sum(size for size, _, _ in sizes)
        measured.outputs = sum(elements for _, elements, _ in sizes)
        measured.head_dim = max((columns for *_, columns in sizes), default=0)
        self._open("head", index)
        return found

    @contextmanager
    def _watched(self, layer: nn.Module) -> Iterator[None]:
        """Context manager of a layer's recomputation, which sees whether its MLP is computed.

        A recomputation that does not need a tiled MLP's output ends before, by an exception.
        """
        if "forward" not in vars(getattr(layer, "mlp", layer)):  # no tiles
            yield
            return
        mlp: Any = layer.mlp
        hook = mlp.register_forward_hook(lambda *_: setattr(self, "repeats_mlps", True))
        try:
            yield
        finally:
            hook.remove()

    def _precision(self) -> Any:
        return Bfloat16Products(self._casts) if self._mixed else nullcontext()

    def _linear(self, module: nn.Module, x: Tensor) -> Tensor:
        with self._precision():
            return type(module).forward(module, x)

    def _open(self, phase: str, index: int) -> None:
        """Ends the current phase (forward, head or backward), and starts a new one."""
        if phase == "forward" and index == 0:
            self.around = self.tracker.live - self.layers[0].inputs
        self._close()
        self._last = phase, index, self.tracker.live
        self.tracker.restart()

    def _close(self) -> None:
        if self._last is None:
            return
        phase, index, begin = self._last
        taken = self.tracker.peak - begin
        if phase == "head":
            self.head = taken
        else:
            setattr(self.layers[index], phase, taken)
        if phase == "backward":
            self.layers[index].by_head = self.tracker.peak_by_head - begin
            self.layers[index].beside = self.tracker.peak_beside - begin


def _loss_bytes(inner: Any, tokens: int, precision: str) -> int:
    """Returns the bytes of a chunk of logits plus the output embedding's float32 gradient."""
    weight = _head_weight(inner)
    if weight is None:
        return 0
    size = 2 if precision == "bf16-mixed" else weight.element_size()
    vocabulary = weight.shape[0]
    chunk = pick_chunk_tokens(tokens, vocabulary, size, weight.device, ACCELERATOR_CHUNK_BYTES)
    return chunk * vocabulary * size + (4 * weight.numel() if weight.requires_grad else 0)


def _head_weight(inner: Any) -> Tensor | None:
    """Returns the weight of a model's output projection; None if it has none."""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    return getattr(head, "weight", None)


def _head_passes(weight: Tensor | None) -> int:
    """Returns the number of matrix products of the loss with the output projection."""
    return 3 if weight is not None and weight.requires_grad else 2


def _outputs(result: Tensor) -> tuple[int, int]:
    """Returns elements and columns of attention outputs [T, H, D]; zeros for an lse [H, T]."""
    return (result.numel(), result.shape[-1]) if result.dim() == 3 else (0, 0)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
