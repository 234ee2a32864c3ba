"""Makes the Markdown tables of fused operations and of linear cross-entropy from a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lctrain_kernels.bench.record import BenchmarkRecord, Result

PRODUCTS = "products"
OPERATION_RESULTS = Path(__file__).parent / "results" / "ops"


def operation_tables(record: BenchmarkRecord) -> str:
    """Returns the Markdown tables of `lctrain-bench ops`.

    Fused operations are given as shares of the bandwidth of a copy, and by memory; linear
    cross-entropy by times.

    Args:
        record: Record that `lctrain-bench ops` wrote.
    """
    titles: Mapping[str, str] = record.settings["titles"]
    bandwidth = max(record.settings["copy_bytes_per_s"].values())
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    elementwise = [name for name, work in record.workloads.items() if "forward_bytes" in work]
    losses = [name for name in record.workloads if name not in elementwise]
    text = f"One {record.device}, {record.date[:10]}, {record.settings['dtype']}; {versions}.\n"
    if elementwise:
        text += (
            f"\nShare of the copy bandwidth ({bandwidth / 1e9:,.0f} GB/s), forward / backward, and "
            "in brackets peak memory beside inputs and gradients, GiB:\n\n"
        )

        def share(workload: str, name: str) -> str:
            result = _find(record, workload, name)
            if result is None or result.status != "ok":
                return "-" if result is None else result.status.replace("_", " ")
            assert result.forward_ms
            assert result.backward_ms
            work = record.workloads[workload]
            forward = work["forward_bytes"] / (result.forward_ms / 1000) / bandwidth
            backward = work["backward_bytes"] / (result.backward_ms / 1000) / bandwidth
            return f"{forward:.2f} / {backward:.2f}{_memory(result)}"

        text += _table(record, elementwise, titles, share)
    if losses:
        text += (
            "\nLinear cross-entropy, forward and backward: milliseconds, times over its matrix "
            "products alone, and in brackets peak memory beside inputs and gradients, GiB:\n\n"
        )

        def loss(workload: str, name: str) -> str:
            result = _find(record, workload, name)
            if result is None or result.status != "ok":
                return "-" if result is None else result.status.replace("_", " ")
            assert result.step_ms
            base = _find(record, workload, PRODUCTS)
            ratio = (
                f", {result.step_ms / base.step_ms:.2f}x"
                if base is not None and base.step_ms and name != PRODUCTS
                else ""
            )
            return f"{result.step_ms:.1f}{ratio}{_memory(result)}"

        text += _table(record, losses, titles, loss)
    if missing := record.settings.get("missing"):
        names = "; ".join(f"{titles[name]} ({reason})" for name, reason in missing.items())
        text += f"\nNot timed: {names}.\n"
    return text


def newest_operation_record(folder: Path = OPERATION_RESULTS) -> BenchmarkRecord | None:
    """Returns the newest record of `lctrain-bench ops`; None without one.

    Workloads that it lacks come from older records with the same device, versions and dtype.

    Args:
        folder: Folder of the records.
    """
    records = [BenchmarkRecord.load(path) for path in folder.glob("*.json")]
    if not records:
        return None
    newest, *older = sorted(records, key=lambda record: record.date, reverse=True)
    for record in older:
        same = record.device == newest.device and record.versions == newest.versions
        if not same or record.settings["dtype"] != newest.settings["dtype"]:
            continue
        added = {n: work for n, work in record.workloads.items() if n not in newest.workloads}
        newest.workloads |= added
        newest.results += [result for result in record.results if result.workload in added]
    return newest


def _memory(result: Result) -> str:
    return "" if result.peak_bytes is None else f" ({result.peak_bytes / 2**30:.2f})"


def _find(record: BenchmarkRecord, workload: str, name: str) -> Result | None:
    found = [r for r in record.results if (r.workload, r.peer) == (workload, name)]
    return found[-1] if found else None


def _table(
    record: BenchmarkRecord,
    workloads: Sequence[str],
    titles: Mapping[str, str],
    cell: Callable[[str, str], str],
) -> str:
    """Returns a Markdown table with a row per workload and a column per contender."""
    timed = {result.peer for result in record.results if result.workload in workloads}
    names = [name for name in titles if name in timed]
    rows = [
        "| | " + " | ".join(titles[name] for name in names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| `{workload}` | " + " | ".join(cell(workload, name) for name in names) + " |"
            for workload in workloads
        ),
    ]
    return "\n".join(rows) + "\n"
