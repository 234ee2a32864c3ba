"""`lctrain-bench`: times lctrain's and other libraries' attention, and writes a record.

lctrain-bench --check --workloads 1x32k,mix32k --peers lctrain,fa2
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lctrain_kernels.bench.measure import gpu_timer
from lctrain_kernels.bench.peers import OURS, PEERS
from lctrain_kernels.bench.record import BenchmarkRecord
from lctrain_kernels.bench.report import RESULTS, terminal_table
from lctrain_kernels.bench.run import new_record, run_workloads
from lctrain_kernels.bench.workloads import WORKLOADS


def names_of(known: Mapping[str, object], what: str) -> Callable[[str], list[str]]:
    """Returns a function, for argparse, that reads comma-separated names and refuses unknown ones.

    Args:
        known: Names that are accepted, as keys.
        what: What the names stand for, for the error message.
    """

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{what} must be among {', '.join(known)}, got {text!r}. Separate them by commas."
            )
        return names

    return parse


def positive(text: str) -> int:
    """Reads an integer of at least 1, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}.")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the options of `lctrain-bench` from the command line, or from `arguments`."""
    parser = argparse.ArgumentParser(
        prog="lctrain-bench",
        description="Times lctrain's attention and every installed peer on one GPU.",
        epilog="Workloads:\n"
        + "\n".join(f"  {w.name:16s} {w.describe()}" for w in WORKLOADS.values())
        + "\nPeers:\n"
        + "\n".join(f"  {peer.name:16s} {peer.title}" for peer in PEERS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workloads", type=names_of(WORKLOADS, "workloads"), help="default: all")
    parser.add_argument("--peers", type=names_of(PEERS, "peers"), help="default: all installed")
    parser.add_argument(
        "--repetitions", type=positive, default=3, help="timings per figure, default 3"
    )
    parser.add_argument(
        "--milliseconds", type=positive, default=200, help="length of a timing, default 200"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="judge lctrain against float64 first; a kernel that fails gets no figures",
    )
    parser.add_argument("--output", type=Path, help="the JSON file; default: one in results/")
    return parser.parse_args(arguments)


def results_folder() -> Path:
    """Returns the folder of records: results/ in the checkout, else ./bench-results."""
    in_checkout = (RESULTS.parents[3] / "pyproject.toml").is_file()
    return RESULTS if in_checkout else Path("bench-results")


def default_output(record: BenchmarkRecord) -> Path:
    """Returns the path of the record: DATE-DEVICE.json in the folder of records."""
    device = re.sub(r"[^a-z0-9]+", "-", record.device.lower()).strip("-")
    date = re.sub(r"[^0-9T]", "", record.date.partition("+")[0])
    return results_folder() / f"{date}-{device}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `lctrain-bench`: times the peers, prints tables, and writes the record.

    Returns:
        The exit status: 1 if an lctrain kernel failed, 2 if the machine cannot run the benchmark,
        otherwise 0.
    """
    options = parse_arguments(arguments)
    if not torch.cuda.is_available():
        print(
            "lctrain-bench needs a GPU, and torch sees none. Run it on a machine with a CUDA or "
            "ROCm GPU and a build of torch for it.",
            file=sys.stderr,
        )
        return 2
    peers = []
    for name in options.peers or PEERS:
        missing = PEERS[name].missing()
        if missing is None:
            peers.append(PEERS[name])
        else:
            print(f"{PEERS[name].title}: not timed, {missing}")
    device = torch.device("cuda", torch.cuda.current_device())
    record = new_record(peers, device, options.repetitions, options.milliseconds)
    output = options.output or default_output(record)
    workloads = [WORKLOADS[name] for name in options.workloads or WORKLOADS]
    timer = gpu_timer(options.milliseconds)
    print(f"{record.device}, {', '.join(f'{n} {v}' for n, v in record.versions.items())}")
    for name in run_workloads(
        record,
        workloads,
        peers,
        device,
        timer,
        repetitions=options.repetitions,
        check=options.check,
    ):
        print(terminal_table(record, name), flush=True)
        record.save(output)
    print(f"Wrote {output}")
    ours = [result.status for result in record.results if result.peer == OURS]
    return int("failed_check" in ours or "error" in ours)


if __name__ == "__main__":
    sys.exit(main())
