"""Makes tables from benchmark records, for the terminal and for docs/benchmarks.md.

    python -m lctrain_kernels.bench.report docs/benchmarks.md [RESULT.json ...]

The command rewrites the tables of the page, and draws the picture of long contexts beside it. By
default it reads the newest result file of each device. All other tables come from the newest files
in the folders of `results/`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lctrain_kernels.bench.backward_report import backward_table
from lctrain_kernels.bench.balance_report import balance_table
from lctrain_kernels.bench.chat_report import chat_table
from lctrain_kernels.bench.curves_report import curves_table
from lctrain_kernels.bench.decode_report import decode_table
from lctrain_kernels.bench.detached_report import detached_table
from lctrain_kernels.bench.encoder_report import encoder_table
from lctrain_kernels.bench.evaluation_report import evaluation_tables
from lctrain_kernels.bench.generation_report import generation_tables
from lctrain_kernels.bench.longest_report import longest_table
from lctrain_kernels.bench.masked_lm_report import masked_lm_table
from lctrain_kernels.bench.memory_plot import draw_curve
from lctrain_kernels.bench.memory_report import PICTURE, curve_of, memory_records, memory_tables
from lctrain_kernels.bench.newest import RESULTS, newest_record, records_of
from lctrain_kernels.bench.operation_report import newest_operation_record, operation_tables
from lctrain_kernels.bench.peers import OURS, PEERS
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from lctrain_kernels.bench.scale_report import NOT_MEASURED, newest_scale_record, scale_table
from lctrain_kernels.bench.sft_report import sft_table
from lctrain_kernels.bench.shared_prefix_report import shared_prefix_table
from lctrain_kernels.bench.shares_report import shares_table
from lctrain_kernels.bench.step_report import newest_step_record, step_table
from lctrain_kernels.bench.workloads import WORKLOADS

BEGIN = (
    "<!-- benchmark tables: begin (python -m lctrain_kernels.bench.report docs/benchmarks.md) -->"
)
END = "<!-- benchmark tables: end -->"
NOTHING_MEASURED = "No measurement has been recorded yet.\n"
# Sections of the page beside the main one, each with a folder of results.
SECTIONS = ("dual_chunk", "differential")
# Kinds of records that have one table each: name of the folder and of the section -> the table.
KINDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "varlen_backward": backward_table,
    "curves": curves_table,
    "balance": balance_table,
    "longest": longest_table,
    "encoder": encoder_table,
    "encoder_cpu": encoder_table,
    "masked_lm": masked_lm_table,
    "detached": detached_table,
    "chat": chat_table,
    "sft": sft_table,
    "shares": shares_table,
}


def _each(
    table: Callable[[Mapping[str, Any]], str],
) -> Callable[[Sequence[Mapping[str, Any]]], str]:
    """Returns a function from records to their tables, one below the other."""
    return lambda records: "\n".join(map(table, records))


# Kinds whose tables come from all their records, in the order of dates.
SERIES: dict[str, Callable[[Sequence[Mapping[str, Any]]], str]] = {
    "shared_prefix": _each(shared_prefix_table),
    "decode": _each(decode_table),
    "generation": generation_tables,
    "evaluation": evaluation_tables,
}


def terminal_table(record: BenchmarkRecord, workload: str) -> str:
    """Returns the table of one workload for the terminal: times, speeds, memory and speed-ups."""
    lines = [f"{workload}: {WORKLOADS[workload].describe()}"]
    ours = record.find(workload, OURS)
    for result in record.results:
        if result.workload != workload:
            continue
        title = PEERS[result.peer].title
        if result.status != "ok":
            lines.append(f"  {title:26s} {result.status.replace('_', ' ')}: {result.reason}")
            continue
        line = (
            f"  {title:26s}"
            f" forward {result.forward_ms:9.3f} ms {result.forward_tflops:6.1f} TFLOP/s"
            f"   backward {result.backward_ms:9.3f} ms {result.backward_tflops:6.1f} TFLOP/s"
        )
        if result.peak_bytes is not None:
            line += f"   {result.peak_bytes / 2**30:6.2f} GiB"
        if ours is not None and result.peer != OURS:
            forward, backward = speedups(ours, result)
            line += f"   ours is {forward:.2f}x / {backward:.2f}x"
        if result.error_ratios:
            worst = max(result.error_ratios.values())
            line += f"   error at most {worst:.2f}x plain PyTorch's"
        lines.append(line)
    return "\n".join(lines)


def speedups(ours: Result, peer: Result) -> tuple[float, float]:
    """Returns the speed-up over a peer (forward, backward): its time over lctrain's."""
    assert ours.forward_ms
    assert ours.backward_ms
    assert peer.forward_ms
    assert peer.backward_ms
    return peer.forward_ms / ours.forward_ms, peer.backward_ms / ours.backward_ms


def markdown_tables(record: BenchmarkRecord) -> str:
    """Returns Markdown tables of one run: TFLOP/s, speed-ups over each peer, peak memory."""
    workloads = [name for name in WORKLOADS if record.find(name, OURS)]
    rivals = [name for name in PEERS if any(record.find(w, name) for w in workloads)]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    dtype = record.settings["dtype"]
    text = (
        f"One {record.device}, {record.date[:10]}, {dtype}, one process, medians; {versions}.\n\n"
        "Forward / backward TFLOP/s:\n\n"
    )

    def speed(name: str, workload: str) -> str:
        result = record.find(workload, name)
        if result is None:
            return "-"
        return f"{result.forward_tflops:.0f} / {result.backward_tflops:.0f}"

    def ratio(name: str, workload: str) -> str:
        ours, peer = record.find(workload, OURS), record.find(workload, name)
        if ours is None or peer is None:
            return "-"
        return "{:.2f} / {:.2f}".format(*speedups(ours, peer))

    def memory(name: str, workload: str) -> str:
        result = record.find(workload, name)
        if result is None or result.peak_bytes is None:
            return "-"
        return f"{result.peak_bytes / 2**30:.2f}"

    others = [name for name in rivals if name != OURS]
    text += _table(workloads, rivals, speed)
    if others:
        text += "\nHow many times faster lctrain is than each peer, forward / backward:\n\n"
        text += _table(workloads, others, ratio)
    text += "\nPeak memory of a forward and backward beyond its inputs, GiB:\n\n"
    return text + _table(workloads, rivals, memory)


def time_tables(record: BenchmarkRecord) -> str:
    """Returns the Markdown tables of times of a run whose settings["titles"] names its contenders.

    The first contender is lctrain, whose speed-ups over the others are given.
    """
    titles = record.settings["titles"]
    ours, *others = titles
    workloads = list(record.workloads)
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())

    def time(name: str, workload: str) -> str:
        result = record.find(workload, name)
        if result is None:
            return "-"
        return f"{result.forward_ms:.2f} / {result.backward_ms:.2f}"

    def ratio(name: str, workload: str) -> str:
        mine, peer = record.find(workload, ours), record.find(workload, name)
        if mine is None or peer is None:
            return "-"
        return "{:.2f} / {:.2f}".format(*speedups(mine, peer))

    def memory(name: str, workload: str) -> str:
        result = record.find(workload, name)
        if result is None or result.peak_bytes is None or result.forward_peak_bytes is None:
            return "-"
        return f"{result.forward_peak_bytes / 2**30:.2f} / {result.peak_bytes / 2**30:.2f}"

    text = (
        f"One {record.device}, {record.date[:10]}, {record.settings['dtype']}, one process, "
        f"medians; {versions}.\n\nMilliseconds, forward / backward:\n\n"
    )
    text += _table(workloads, list(titles), time, titles)
    text += f"\nHow many times faster {titles[ours]} is, forward / backward:\n\n"
    text += _table(workloads, others, ratio, titles)
    if any(memory(name, w) != "-" for name in titles for w in workloads):
        text += "\nPeak memory beyond the inputs, GiB, forward / forward and backward:\n\n"
        text += _table(workloads, list(titles), memory, titles)
    return text


def _table(
    workloads: Sequence[str],
    names: Sequence[str],
    cell: Callable[[str, str], str],
    titles: Mapping[str, str] | None = None,
) -> str:
    """Returns a Markdown table with a row per peer, without workloads that have no figures."""
    titles = {name: peer.title for name, peer in PEERS.items()} if titles is None else titles
    shown = [w for w in workloads if any(cell(name, w) != "-" for name in names)]
    rows = [
        "| | " + " | ".join(shown) + " |",
        "|---|" + "---|" * len(shown),
        *(
            f"| {titles[name]} | " + " | ".join(cell(name, w) for w in shown) + " |"
            for name in names
        ),
    ]
    return "\n".join(rows) + "\n"


def newest_results(folder: Path = RESULTS) -> list[Path]:
    """Returns, for each device, the newest record in a folder, by the date in the file."""
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        record = BenchmarkRecord.load(path)
        newest[record.device] = max(newest.get(record.device, ("", path)), (record.date, path))
    return [path for _, path in sorted(newest.values(), reverse=True)]


def readme_with_tables(readme: str, results: Sequence[Path]) -> str:
    """Returns a page's text, with the tables of plain attention between its markers replaced.

    Args:
        readme: Text of the page, Markdown.
        results: Records whose tables are shown.

    Raises:
        ValueError: if the text lacks the markers.
    """
    return _between(readme, BEGIN, END, results, markdown_tables)


def readme_with_sections(readme: str, folder: Path = RESULTS) -> str:
    """Returns a page's text, with the tables of dual chunk and differential attention replaced.

    Args:
        readme: Text of the page, Markdown.
        folder: Folder of the records, with one subfolder per key of SECTIONS.
    """
    for section in SECTIONS:
        begin, end = (f"<!-- {section} tables: {edge} -->" for edge in ("begin", "end"))
        if begin in readme:
            readme = _between(readme, begin, end, newest_results(folder / section), time_tables)
    return readme


def readme_with_steps(readme: str) -> str:
    """Returns the page's text with its tables of steps, operations, KINDS and SERIES replaced.

    A page without the markers of such a table is left as it is.

    Raises:
        ValueError: if the text has the first marker of a table but not the last one.
    """
    operations = newest_operation_record()
    records = {kind: newest_record(kind) for kind in KINDS}
    scale = newest_scale_record()
    tables = {
        **{
            kind: NOTHING_MEASURED if record is None else KINDS[kind](record)
            for kind, record in records.items()
        },
        **{
            kind: tables_of(records_of(kind)) or NOTHING_MEASURED
            for kind, tables_of in SERIES.items()
        },
        "memory": memory_tables(memory_records()) or NOTHING_MEASURED,
        "step": step_table(newest_step_record()),
        "ops": NOTHING_MEASURED if operations is None else operation_tables(operations),
        "scale": NOT_MEASURED if scale is None else scale_table(scale),
    }
    for name, table in tables.items():
        begin, end = (f"<!-- {name} tables: {edge} -->" for edge in ("begin", "end"))
        if begin not in readme:
            continue
        before, _, rest = readme.partition(begin)
        _, has_end, after = rest.partition(end)
        if not has_end:
            raise ValueError(f"the page must hold the lines {begin!r} and {end!r}. Add them.")
        readme = f"{before}{begin}\n\n{table}\n{end}{after}"
    return readme


def _between(
    readme: str,
    begin: str,
    end: str,
    results: Sequence[Path],
    render: Callable[[BenchmarkRecord], str],
) -> str:
    before, has_begin, rest = readme.partition(begin)
    _, has_end, after = rest.partition(end)
    if not has_begin or not has_end:
        raise ValueError(f"the page must hold the lines {begin!r} and {end!r}. Add them.")
    tables = [render(BenchmarkRecord.load(path)) for path in results]
    return f"{before}{begin}\n\n{(chr(10).join(tables) or NOTHING_MEASURED)}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the tables of a page from result files; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m lctrain_kernels.bench.report", description=main.__doc__
    )
    parser.add_argument("readme", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    results = options.results or newest_results()
    text = options.readme.read_text()
    if points := curve_of(memory_records()):
        draw_curve(points, options.readme.with_name(PICTURE))
    try:
        text = readme_with_sections(readme_with_tables(text, results))
        options.readme.write_text(readme_with_steps(text))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
