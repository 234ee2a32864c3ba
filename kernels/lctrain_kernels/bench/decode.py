"""`lctrain-bench decode`: times attention over key/value caches beside other libraries.

    lctrain-bench decode
    lctrain-bench decode --cases 1x16k,64x8k --layouts dense,page16 --configs 64x64:4:3:512:4
    lctrain-bench decode --tiny

A case is requests x keys. Each request has one query. Times are those of a replayed CUDA graph
whose calls read different caches, so that no call finds its keys in L2. The figure is bytes of keys
and values over time, as a share of the copy bandwidth. A configuration is
rows x keys:warps:stages:split size:programs per multiprocessor, with 0 programs for no plan. It may
go on with :limit of registers (0 for none):splits that the merge loads together:1 to load page
numbers a tile ahead. The case 16x16k+256 is 16 requests
with 256 keys each after a prefix of 16k keys that all share.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lctrain_kernels import flash_attn_with_kvcache, make_decode_plan
from lctrain_kernels.bench.__main__ import names_of, positive, results_folder
from lctrain_kernels.bench.decode_peers import PEERS, DecodeInputs
from lctrain_kernels.bench.decode_prefix import measure_prefix
from lctrain_kernels.bench.decode_shapes import (
    CASES,
    COLD_BYTES,
    LAYOUTS,
    MAX_DIFFERENCE,
    OURS,
    TINY,
    DecodeShape,
    time_calls,
)
from lctrain_kernels.bench.measure import graph_timer
from lctrain_kernels.bench.operations import copy_bandwidth, wall_timer
from lctrain_kernels.bench.peers import installed_version
from lctrain_kernels.bench.run import DTYPE, new_record
from lctrain_kernels.decode.launch_config import DecodeConfig, decode_config, override_decode_config
from lctrain_kernels.strict_json import write_json
from lctrain_kernels.tile.config import TileConfig

MERGED = DecodeConfig(TileConfig(16, 64, 4, 3), 64).merge_unroll
"""Splits that the merge loads together by default."""


def parse_config(text: str) -> DecodeConfig:
    """Reads a configuration, such as "64x64:4:3:512:4", as an argparse type."""
    found = re.fullmatch(r"(\d+)x(\d+):(\d+):(\d+):(\d+):(\d+)(?::(\d+):(\d+):(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            "a configuration is ROWSxKEYS:WARPS:STAGES:SPLIT:PROGRAMS[:REGISTERS:MERGED:AHEAD], "
            f"got {text!r}."
        )
    rows, keys, warps, stages, split, programs, registers, merged, ahead = (
        int(number or 0) for number in found.groups()
    )
    if keys == 0 or split % keys:
        raise argparse.ArgumentTypeError(
            f"the split size must be a multiple of the keys of a tile, got {text!r}."
        )
    tile = TileConfig(rows, keys, warps, stages, max_registers=registers or None)
    return DecodeConfig(tile, split, programs, bool(ahead), merge_unroll=merged or MERGED)


def config_name(config: DecodeConfig) -> str:
    """Returns the text that parse_config reads as this configuration."""
    tile = config.tile
    sizes = (f"{tile.block_m}x{tile.block_n}", tile.num_warps, tile.num_stages, config.split_size)
    numbers = [*sizes, config.programs]
    if tile.max_registers or config.merge_unroll != MERGED or config.prefetch_pages:
        numbers += [tile.max_registers or 0, config.merge_unroll, int(config.prefetch_pages)]
    return ":".join(map(str, numbers))


def draw_inputs(shape: DecodeShape, device: torch.device) -> DecodeInputs:
    """Draws queries and enough caches that none of them stays in L2.

    Args:
        shape: Sizes of the case.
        device: Device of the tensors.
    """
    dtype = DTYPE if device.type == "cuda" else torch.float32
    copies = max(1, -(-COLD_BYTES // shape.cache_bytes)) if device.type == "cuda" else 1
    size = (copies, shape.requests, shape.keys, shape.heads_kv, shape.head_dim)
    k, v = (torch.empty(size, dtype=dtype, device=device).normal_() for _ in range(2))
    q = torch.randn(shape.requests, 1, shape.heads, shape.head_dim, dtype=dtype, device=device)
    lengths = torch.full((shape.requests,), shape.keys, dtype=torch.int32, device=device)
    return DecodeInputs(q, k, v, lengths)


def ours(inputs: DecodeInputs, page: int, config: DecodeConfig) -> list[Any]:
    """Returns lctrain's calls, one per cache; the plan of the step is made beforehand.

    Args:
        inputs: Tensors of the case.
        page: Tokens of a page; 0 for a dense cache.
        config: Configuration, which the caller also sets during the calls.
    """
    table = inputs.table(page)
    plan = None
    if config.programs:
        plan = make_decode_plan(
            *(inputs.lengths, inputs.keys, inputs.q.shape[3], inputs.q.dtype), new_tokens=0
        )
    return [
        partial(
            flash_attn_with_kvcache,
            inputs.q,
            *inputs.cache(copy, page),
            cache_seqlens=inputs.lengths,
            block_table=table,
            causal=True,
            plan=plan,
            max_seqlen_k=inputs.keys,
        )
        for copy in range(len(inputs.k))
    ]


def compile_config(config: DecodeConfig, page: int) -> None:
    """Compiles the kernels of a configuration into Triton's cache, in a process of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    shape = DecodeShape(2, 2048)
    k = torch.zeros(1, 2, 2048, shape.heads_kv, shape.head_dim, dtype=DTYPE, device=device)
    q = torch.zeros(2, 1, shape.heads, shape.head_dim, dtype=DTYPE, device=device)
    inputs = DecodeInputs(q, k, k, torch.full((2,), 2048, dtype=torch.int32, device=device))
    with override_decode_config(config):
        for call in ours(inputs, page, config):
            call()


def compile_all(configs: Sequence[DecodeConfig], pages: Sequence[int]) -> None:
    """Compiles every configuration and page size in processes side by side."""
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(compile_config, c, page) for c in configs for page in pages]
        for job in jobs:
            if job.exception() is not None:
                print(f"not compiled: {job.exception()}".splitlines()[0], flush=True)


def measure_case(
    shape: DecodeShape,
    layouts: Sequence[str],
    configs: Sequence[DecodeConfig],
    peers: Sequence[str],
    device: torch.device,
    timer: Any,
) -> Iterator[dict[str, Any]]:
    """Times all contenders on a case.

    Args:
        shape: Sizes of the case.
        layouts: Layouts of the cache, keys of LAYOUTS.
        configs: Configurations of lctrain's kernels.
        peers: Peers, keys of PEERS.
        device: Device of the tensors.
        timer: Function that returns the milliseconds of a call.

    Yields:
        One result per contender and layout: its time and bytes per second, or an error.
    """
    inputs = draw_inputs(shape, device)
    expected = PEERS["sdpa"](inputs, 0)[0]().float()
    for layout in layouts:
        page = LAYOUTS[layout]
        contenders: list[tuple[str, DecodeConfig | None]] = [(OURS, c) for c in configs]
        for name, config in [*contenders, *((peer, None) for peer in peers)]:
            result: dict[str, Any] = {"layout": layout, "contender": name}
            if config is not None:
                result["config"] = config_name(config)
            try:
                with override_decode_config(config) if config is not None else nullcontext():
                    calls = (
                        PEERS[name](inputs, page) if config is None else ours(inputs, page, config)
                    )
                    found = calls[0]().float()
                    difference = float((found - expected).norm() / expected.norm())
                    if not difference < MAX_DIFFERENCE:
                        raise ArithmeticError(f"differs from PyTorch by {difference:.1e}")
                    milliseconds = time_calls(calls, timer)
            except Exception as error:  # record the error and time the others
                result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                result["microseconds"] = round(1000 * milliseconds, 2)
                result["bytes_per_s"] = shape.cache_bytes / milliseconds * 1000
            yield result


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options of `lctrain-bench decode`."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", type=names_of(CASES, "cases"), default=list(CASES))
    parser.add_argument(
        "--layouts", type=names_of(LAYOUTS, "layouts"), default=["dense", "page16", "page256"]
    )
    parser.add_argument(
        "--configs", type=parse_config, nargs="*", help="default: that of the table"
    )
    parser.add_argument("--peers", type=names_of(PEERS, "peers"), default=list(PEERS))
    parser.add_argument("--milliseconds", type=positive, default=60, help="length of a timing")
    parser.add_argument("--tiny", action="store_true", help="a small case, for a trial on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file; default: one in results/decode/")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `lctrain-bench decode`, and writes the record after every case.

    Returns:
        The exit status: 1 if lctrain failed, 2 if the machine cannot run the benchmark, otherwise
        0.
    """
    options = parse_arguments(arguments)
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        print(
            "lctrain-bench decode needs a GPU, and torch sees none. Try it with --tiny.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    timer = graph_timer(options.milliseconds) if on_gpu else wall_timer
    cases = TINY if options.tiny else {name: CASES[name] for name in options.cases}
    head = new_record([], device, 1, options.milliseconds)
    versions = {name: installed_version(name) for name in ("flashinfer-python", "flash-attn-4")}
    record: dict[str, Any] = {
        "device": head.device,
        "date": head.date,
        "versions": {**head.versions, **{k: v for k, v in versions.items() if v is not None}},
        "cases": {name: asdict(shape) for name, shape in cases.items()},
        "results": [],
    }
    date = head.date.partition("T")[0].replace("-", "")
    output = options.output or results_folder() / "decode" / f"{date}-{head.device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if on_gpu else nullcontext()
    with torch.no_grad(), stream:
        configs = options.configs or [decode_config(_one_query(device))]
        if on_gpu:
            compile_all(configs, [LAYOUTS[name] for name in options.layouts])
        record["copy_bytes_per_s"] = copy_bandwidth(device, timer, options.tiny)
        fastest = max(record["copy_bytes_per_s"].values())
        print(f"{head.device}, copies {fastest / 1e12:.3f} TB/s", flush=True)
        for name, shape in cases.items():
            if shape.prefix:
                measured = measure_prefix(shape, options.layouts, configs, device, timer)
            else:
                measured = measure_case(
                    *(shape, options.layouts, configs, options.peers, device, timer)
                )
            for result in measured:
                record["results"].append({"case": name, **result})
                _show(name, result, fastest)
            write_json(output, record, indent=1)
    print(f"Wrote {output}")
    ours_failed = [r for r in record["results"] if r["contender"].startswith(OURS) and "error" in r]
    return int(bool(ours_failed))


def _one_query(device: torch.device) -> Tensor:
    dtype = DTYPE if device.type == "cuda" else torch.float32
    return torch.empty(1, 1, 1, 128, dtype=dtype, device=device)


def _show(case: str, result: dict[str, Any], fastest: float) -> None:
    label = (
        f"{case:8s} {result['layout']:8s} {result['contender']:12s} {result.get('config', ''):22s}"
    )
    if "error" in result:
        print(label, result["error"], flush=True)
        return
    share = result["bytes_per_s"] / fastest
    faster = f"  {result['speedup']:.1f}x own pages" if "speedup" in result else ""
    print(label, f"{result['microseconds']:10.1f} us  {share:6.1%} of copies{faster}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
