"""Tables of a benchmark record: for the terminal, and for the README.

    python -m lctrain.kernels.bench.report README.md [RESULT.json ...]

writes the README's table anew from the results, by default the newest file of each device.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lctrain.kernels.bench.peers import OURS, PEERS
from lctrain.kernels.bench.record import BenchmarkRecord, Result
from lctrain.kernels.bench.workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- benchmark tables: begin (python -m lctrain.kernels.bench.report README.md) -->"
END = "<!-- benchmark tables: end -->"
NOTHING_MEASURED = "No measurement has been recorded yet.\n"


def terminal_table(record: BenchmarkRecord, workload: str) -> str:
    """What the terminal shows of one workload: times, speeds, memory, and ours over each peer."""
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
    """How many times faster ours is, forward and backward."""
    assert ours.forward_ms
    assert ours.backward_ms
    assert peer.forward_ms
    assert peer.backward_ms
    return peer.forward_ms / ours.forward_ms, peer.backward_ms / ours.backward_ms


def markdown_tables(record: BenchmarkRecord) -> str:
    """The README's tables of one run: TFLOP/s, ours over each peer, and peak memory."""
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


def _table(workloads: Sequence[str], names: Sequence[str], cell: Callable[[str, str], str]) -> str:
    """A markdown table, one row per peer; workloads without any figure are left out."""
    shown = [w for w in workloads if any(cell(name, w) != "-" for name in names)]
    rows = [
        "| | " + " | ".join(shown) + " |",
        "|---|" + "---|" * len(shown),
        *(
            f"| {PEERS[name].title} | " + " | ".join(cell(name, w) for w in shown) + " |"
            for name in names
        ),
    ]
    return "\n".join(rows) + "\n"


def newest_results(folder: Path = RESULTS) -> list[Path]:
    """The newest result file of each device, by the date inside."""
    newest: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob("*.json")):
        record = BenchmarkRecord.load(path)
        newest[record.device] = max(newest.get(record.device, ("", path)), (record.date, path))
    return [path for _, path in sorted(newest.values(), reverse=True)]


def readme_with_tables(readme: str, results: Sequence[Path]) -> str:
    """Returns the README's text with what lies between the markers written anew.

    Raises:
        ValueError: if the text lacks the markers.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README must hold the lines {BEGIN!r} and {END!r}. Add them.")
    tables = [markdown_tables(BenchmarkRecord.load(path)) for path in results]
    return f"{before}{BEGIN}\n\n{(chr(10).join(tables) or NOTHING_MEASURED)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites the tables of a README."""
    parser = argparse.ArgumentParser(
        prog="python -m lctrain.kernels.bench.report", description=main.__doc__
    )
    parser.add_argument("readme", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    options = parser.parse_args(arguments)
    results = options.results or newest_results()
    text = options.readme.read_text()
    try:
        options.readme.write_text(readme_with_tables(text, results))
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
