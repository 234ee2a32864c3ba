"""`lctrain-bench longest`: computes the longest context that fits, from a laptop to one H200.

    lctrain-bench longest --output longest.json

For every model and machine the command searches the largest number of tokens of one document whose
plan fits under `memory=auto`. Nothing is run, and no GPU is needed.

The bytes of a step do not quite grow with the tokens: a tile of an MLP has the same size in every
pack. So the search scales the bytes of one length, and is repeated with those of the length found.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lctrain.allocator import expand_segments
from lctrain.bench.shapes import SHAPES, ModelShape, build_shape, llama_8b, tiny
from lctrain.config import AdapterConfig, MemoryConfig
from lctrain.memory.plan import GIB, plan_of
from lctrain.memory.profile import LayerBytes, Profile, profile
from lctrain.models import patch_model
from lctrain.models.low_rank import add_adapter, leave_casts_to_autocast
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.strict_json import write_json

RANK = 16
MLP_TOKENS = 4096
PROFILED = 2**18  # tokens of the first profile: 64 tiles, so that a layer's attention sets its peak
NEAR = 64  # a result is scaled from a profile at most a 64th shorter or longer
STEP = 1024  # tokens; lengths are multiples of it
MOST = 2**23  # tokens
MACHINES = ((8, 8), (16, 16), (24, 32), (48, 64), (80, 128), (139, 100))  # GiB of GPU and host


@dataclass(frozen=True)
class Setting:
    """A model that is trained, and the format of its frozen weights: None (bfloat16) or "nf4"."""

    shape: ModelShape
    quantize: str | None

    @property
    def title(self) -> str:
        """Name in the table."""
        return f"{self.shape.title}, {self.quantize or 'bfloat16'}"


SETTINGS = (
    Setting(SHAPES["llama-1b"], None),
    Setting(llama_8b, "nf4"),
    Setting(llama_8b, None),
)


def scaled(measured: Profile, tokens: int) -> Profile:
    """Returns the bytes of a step on another number of tokens.

    Activations grow with the tokens. An MLP's tile and the dense copy of a quantized weight do not,
    so the result is too large by their growth for longer packs, and too small for shorter ones.

    Args:
        measured: Bytes of a step, from `profile`.
        tokens: Number of tokens.
    """
    factor = tokens / measured.tokens

    def layer(one: LayerBytes) -> LayerBytes:
        names = {field.name for field in fields(one)} - {"gradients"}
        return replace(one, **{name: int(getattr(one, name) * factor) for name in names})

    return replace(
        measured,
        tokens=tokens,
        layers=tuple(map(layer, measured.layers)),
        around=int(measured.around * factor),
        head=int(measured.head * factor),
        attention_operations=measured.attention_operations * factor**2,
        other_operations=measured.other_operations * factor,
        trained_operations=measured.trained_operations * factor,
        tile_operations=measured.tile_operations * factor,
        head_operations=measured.head_operations * factor,
    )


def longest(profile_of: Callable[..., Profile], device_gib: float, host_gib: float) -> int:
    """Returns the largest number of tokens that fits under `memory=auto`; 0 if none does.

    Args:
        profile_of: Function that returns the bytes of a step on a number of tokens, as `profile`
            does; it takes device_limit, the memory of the GPU in bytes.
        device_gib: Memory of the GPU in GiB.
        host_gib: Host memory in GiB that the step may use.
    """
    config = MemoryConfig(
        name="auto", mlp_tokens=MLP_TOKENS, device_gib=device_gib, host_gib=host_gib
    )
    limits = int(device_gib * GIB), int(host_gib * GIB)

    def profile_at(tokens: int) -> Profile:
        return profile_of(tokens, device_limit=limits[0])

    def search(measured: Profile) -> int:
        """Returns the largest number of tokens that fits, from the bytes of another number."""
        measured = _recomputing_attention(measured)
        low, high = 0, MOST // STEP
        while low < high:
            middle = (low + high + 1) // 2
            fits = plan_of(scaled(measured, middle * STEP), config, *limits).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * STEP

    profiled = PROFILED
    found = search(profile_at(profiled))
    while found > 0 and NEAR * abs(found - profiled) > profiled:
        profiled = found
        found = search(profile_at(profiled))
    return found


def _recomputing_attention(measured: Profile) -> Profile:
    """Returns the bytes of a step in which no attention can be kept.

    Keeping it takes memory, so it never fits where recomputing does not. There are a hundred times
    fewer policies without it.
    """
    layers = tuple(replace(layer, attention=0) for layer in measured.layers)
    return replace(measured, layers=layers)


def profiles(setting: Setting) -> Callable[..., Profile]:
    """Returns a function from tokens and device_limit to the bytes of a step with adapters."""
    model = build_shape(setting.shape, "sdpa", torch.device("meta"), torch.bfloat16)
    patch_model(model, fused=True)
    model = add_adapter(model, AdapterConfig(rank=RANK)).train()
    leave_casts_to_autocast(model)
    return partial(
        profile,
        model,
        precision="bf16-mixed",
        mlp_tokens=MLP_TOKENS,
        quantize=setting.quantize,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench longest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models, for a trial")
    parser.add_argument("--output", type=Path, default=Path("longest.json"), help="JSON file")
    options = parser.parse_args(arguments)
    expand_segments(platform="linux")  # the plans are for that platform, whatever this one is
    found: list[dict[str, Any]] = []
    for setting in SETTINGS:
        if options.tiny:
            setting = replace(setting, shape=tiny(setting.shape))
        profile_of = profiles(setting)
        for device, host in MACHINES:
            tokens = longest(profile_of, device, host)
            found.append(
                {"model": setting.title, "device_gib": device, "host_gib": host, "tokens": tokens}
            )
            print(f"{setting.title}: {device} GiB and {host} on the host: {tokens:,}", flush=True)
    record = {
        "device": platform.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "torch": torch.__version__,
            "transformers": installed_version("transformers"),
        },
        "rank": RANK,
        "mlp_tokens": MLP_TOKENS,
        "plans": found,
    }
    write_json(options.output, record, indent=1)
    print(f"Wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
