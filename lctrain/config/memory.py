"""The settings of memory: which activations a step keeps, where, and which it recomputes."""

from __future__ import annotations

from dataclasses import dataclass

from lctrain.limits import require

POLICIES = ("none", "checkpoint", "offload", "auto")
REFERENCES = ("device", "host")
WITH_HOST = ("offload", "auto")  # policies that keep tensors on the host


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of activation memory: what the layers keep from forward to backward.

    Attributes:
        name: Policy: none (all activations stay on the GPU), checkpoint (only the inputs of the
            layers stay there, the rest is recomputed), offload (inputs of layers move to the host)
            or auto (the fastest policy that fits into memory).
        keep_attention: Number of layers, counted from the last, whose attention outputs stay on the
            GPU, so that attention is not recomputed.
        host_attention: Number of layers just before those of keep_attention, whose attention
            outputs move to the host (offload only).
        keep_inputs: Number of layers, counted from the last, whose inputs stay on the GPU (offload
            and auto); None takes 2.
        segment_layers: Number of consecutive layers in a segment. Only the input of a segment's
            first layer is kept. The backward computes the other inputs again: it runs the layers
            before them once more, and reuses attention outputs that are kept (checkpoint and
            offload).
        reuse_attention: Number of layers, counted from the first, that run once more to rebuild an
            input, and whose attention outputs then stay on the GPU until the layer's own backward.
            Their attention is recomputed once, not twice.
        backward_by_head: Whether attention's backward computes one key/value head at a time, which
            takes less memory (checkpoint and offload). Differential attention computes all at once.
        mlp_tokens: Number of tokens that an MLP computes at a time in training; None computes all
            tokens at once. Results are equal within rounding (all policies but none).
        device_gib: Memory of the GPU in GiB that the plan assumes; None takes the free memory.
        host_gib: Largest host memory in GiB for a rank; None takes what the process may still use
            (offload and auto).
        tokens: Number of tokens of the longest pack, for which host memory is reserved and planned;
            None takes data.max_tokens.
        plan: Whether to print the memory plan and stop, without data or a GPU.
        reference: Place of a frozen reference model's layers, in preference and policy training:
            "device" or "host"; None takes the host with offload and auto, else the
            device. lctrain-train has no reference model, and refuses the option.
    """

    name: str = "none"
    keep_attention: int = 0
    host_attention: int = 0
    keep_inputs: int | None = None
    segment_layers: int = 1
    reuse_attention: int = 0
    backward_by_head: bool = False
    mlp_tokens: int | None = None
    device_gib: float | None = None
    host_gib: float | None = None
    tokens: int | None = None
    plan: bool = False
    reference: str | None = None

    def __post_init__(self) -> None:
        require(
            self.name in POLICIES,
            f"memory.name must be one of {', '.join(POLICIES)}, got {self.name!r}. Choose "
            "memory=auto if in doubt.",
        )
        for option in ("keep_attention", "host_attention", "reuse_attention", "keep_inputs"):
            value = getattr(self, option)
            require(
                value is None or value >= 0,
                f"memory.{option} must be at least 0, got {value}. It is a number of layers.",
            )
        require(
            self.host_attention == 0 or self.name == "offload",
            f"memory.host_attention must be 0 for memory={self.name}, got {self.host_attention}. "
            "Choose memory=offload.",
        )
        require(
            self.keep_attention == 0 or self.name in ("checkpoint", "offload"),
            f"memory.keep_attention must be 0 for memory={self.name}, got {self.keep_attention}. "
            "Choose memory=checkpoint or memory=offload.",
        )
        require(
            self.segment_layers >= 1,
            f"memory.segment_layers must be at least 1, got {self.segment_layers}. 1 keeps the "
            "input of every layer.",
        )
        require(
            self.segment_layers == 1 or self.name in ("checkpoint", "offload"),
            f"memory.segment_layers must be 1 for memory={self.name}, got {self.segment_layers}. "
            "Choose memory=checkpoint or memory=offload.",
        )
        require(
            self.reuse_attention == 0 or self.segment_layers > 1,
            f"memory.reuse_attention must be 0 without segments, got {self.reuse_attention}: no "
            "layer runs twice in the backward. Set memory.segment_layers above 1.",
        )
        require(
            not self.backward_by_head or self.name in ("checkpoint", "offload"),
            f"memory.backward_by_head must be false for memory={self.name}, got true. Choose "
            "memory=checkpoint or memory=offload.",
        )
        for option in ("keep_inputs", "host_gib"):
            value = getattr(self, option)
            require(
                value is None or self.name in WITH_HOST,
                f"memory.{option} must be null for memory={self.name}, which keeps nothing on the "
                f"host, got {value}. Choose memory=offload or memory=auto.",
            )
        for option in ("device_gib", "host_gib"):
            gib = getattr(self, option)
            require(
                gib is None or 0.0 < gib < float("inf"),
                f"memory.{option} must be above 0 and finite, got {gib}. Use null for what is "
                "free.",
            )
        require(
            self.mlp_tokens is None or self.mlp_tokens >= 1,
            f"memory.mlp_tokens must be at least 1, got {self.mlp_tokens}. Try 4096.",
        )
        require(
            self.mlp_tokens is None or self.name != "none",
            f"memory.mlp_tokens must be null for memory=none, got {self.mlp_tokens}. Choose "
            "memory=checkpoint, offload or auto.",
        )
        require(
            self.tokens is None or self.tokens >= 2,
            f"memory.tokens must be at least 2, got {self.tokens}. Use null for data.max_tokens.",
        )
        require(
            self.reference is None or self.reference in REFERENCES,
            f"memory.reference must be null or one of {', '.join(REFERENCES)}, got "
            f"{self.reference!r}. null chooses by the policy.",
        )

    @property
    def reference_on_host(self) -> bool:
        """Whether the layers of a frozen reference model are in the host's memory."""
        if self.reference is None:
            return self.name in WITH_HOST
        return self.reference == "host"


def check_tiles(memory: MemoryConfig | None, precision: str, *, is_sharded: bool = False) -> None:
    """Raises ValueError if mlp_tokens would sum gradients of float16 or bfloat16 weights.

    Args:
        memory: Settings of memory; None for none.
        precision: Precision of Lightning's Trainer.
        is_sharded: Whether trainer.strategy=fsdp2, which gathers weights in bfloat16 under
            bf16-mixed.
    """
    mlp_tokens = None if memory is None else memory.mlp_tokens
    require(
        mlp_tokens is None or precision not in ("bf16-true", "16-true"),
        f"memory.mlp_tokens must be null with trainer.precision={precision}, got {mlp_tokens}: the "
        "sum of the gradients over tiles would be rounded at every tile. Use bf16-mixed.",
    )
    require(
        mlp_tokens is None or precision != "bf16-mixed" or not is_sharded,
        f"memory.mlp_tokens must be null with trainer.strategy=fsdp2 in bf16-mixed, got "
        f"{mlp_tokens}: the gathered weights are bfloat16, so the sum of their gradients over "
        "tiles would be rounded at every tile. Use memory=offload, or trainer.precision=32-true.",
    )
