"""Compares the compiled code of two commits: `python -m tests.kernels.compare_code BASE`.

Compares the assembly (PTX, or AMD's assembly) of every ahead-of-time variant in the working tree
with that of the commit BASE, on one Triton. ptxas is not run, since it gives different machine code
for the same PTX from run to run (bench/NOTES.md has the counts). Equal PTX is the stronger check.

`--machine-code` compares registers, spills, shared memory and instructions instead. It uses the
reports in each tree's `aot_reports/`, and compiles other variants by that tree's own script. A
variant that differs is compiled `--repeat` more times on both sides. It counts as different only if
the two sides have no machine code in common.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.house.typecheck import ROOT
from tests.kernels.aot_process import SELECTIONS, triton_folder

COMPARED = ("assembly", "registers", "spill_bytes", "shared_bytes", "machine_code", "loop_spills")
Name = tuple[str, str]
"""Target and name of a variant."""


def unpack(commit: str, folder: Path) -> None:
    """Unpacks the files of a commit into a folder."""
    archive = folder / "commit.tar"
    subprocess.run(["git", "archive", "-o", archive, commit], cwd=ROOT, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def kept(root: Path, version: str) -> dict[str, dict]:
    """Returns the ahead-of-time reports that a source tree keeps for a Triton version, by key."""
    file = root / "tests" / "kernels" / "aot_reports" / f"triton-{version}.jsonl"
    if not file.is_file():
        return {}
    return {report["key"]: report for report in map(json.loads, file.read_text().splitlines())}


def run_script(script: Path, root: Path, version: str, request: dict) -> list[dict]:
    """Runs a script of the ahead-of-time tests on a tree; returns the JSON that it prints.

    Args:
        script: A script that takes one JSON object and prints one per variant.
        root: Root of the tree whose kernels and variants are used.
        version: Triton version.
        request: The JSON object for the script.

    Raises:
        RuntimeError: if the script fails.
    """
    folder = triton_folder(version)
    paths = [str(path) for path in (folder, root, root / "kernels") if path is not None]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    result = subprocess.run(
        [sys.executable, script, json.dumps(request)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{script} failed:\n{result.stderr}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def assemblies(root: Path, version: str, request: dict) -> dict[Name, dict]:
    """Returns the output lines of assembly_of.py for a source tree, by target and name.

    The arguments are those of `run_script`.
    """
    script = Path(__file__).with_name("assembly_of.py")
    return {(r["target"], r["name"]): r for r in run_script(script, root, version, request)}


def reports(
    root: Path, version: str, selections: Sequence, known: dict[str, dict]
) -> dict[Name, dict]:
    """Returns the reports of all variants of some selections in a tree.

    Args:
        root: Root of the tree.
        version: Triton version.
        selections: Selections, as in aot_compile.py.
        known: Reports by key; variants with these keys are not compiled.
    """
    script = root / "tests" / "kernels" / "aot_compile.py"
    request = {"selections": selections, "known": sorted(known)}
    lines = run_script(script, root, version, request)
    return {(r["target"], r["name"]): known.get(r["key"], {}) | r for r in lines}


def differences(base: dict[Name, dict], head: dict[Name, dict]) -> dict[Name, list[str]]:
    """Returns the differing fields of COMPARED, by variant; also variants that one side lacks."""
    found = {}
    for name in sorted(base.keys() | head.keys()):
        if name not in base or name not in head:
            found[name] = [f"only in {'the working tree' if name in head else 'BASE'}"]
            continue
        fields = [x for x in COMPARED if base[name].get(x) != head[name].get(x)]
        if fields:
            found[name] = fields
    return found


def machine_code_differences(
    trees: Sequence[Path], version: str, selections: Sequence, repeat: int
) -> tuple[int, dict[Name, list[str]]]:
    """Compares the machine code of two source trees; the second is the working tree.

    Args:
        trees: Roots of both trees.
        version: Triton version.
        selections: Selections, as in aot_compile.py.
        repeat: Number of further compilations of a variant that differs.

    Returns:
        The number of variants in the working tree, and the differences by variant.
    """
    base, head = (reports(tree, version, selections, kept(tree, version)) for tree in trees)
    different = differences(base, head)
    codes: dict[Name, tuple[set, set]] = {
        name: ({base[name].get("machine_code")}, {head[name].get("machine_code")})
        for name, fields in different.items()
        if fields == ["machine_code"]
    }
    targets = {target for target, _ in codes}
    again = [selection for selection in selections if selection[0] in targets]
    for _ in range(repeat if codes else 0):
        for side, tree in enumerate(trees):
            # What does not differ is left out by its key.
            known = {
                report["key"]: report
                for name, report in (base, head)[side].items()
                if name not in codes
            }
            for name, report in reports(tree, version, again, known).items():
                if name in codes:
                    codes[name][side].add(report.get("machine_code"))
    for name, (ours, theirs) in codes.items():
        if ours & theirs:
            del different[name]
    return len(head), different


def main() -> int:
    """Prints all differences; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--triton", default="3.6.0", choices=list(SELECTIONS))
    parser.add_argument("--target", nargs="*", help="targets to compare; default: all")
    parser.add_argument("--only", default="", help="pattern of the variants' names")
    parser.add_argument("--machine-code", action="store_true")
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    version = options.triton
    selections = [s for s in SELECTIONS[version] if not options.target or s[0] in options.target]
    with tempfile.TemporaryDirectory() as folder:
        trees = (Path(folder), ROOT)
        unpack(options.base, trees[0])
        if options.machine_code:
            total, different = machine_code_differences(trees, version, selections, options.repeat)
        else:
            request = {"selections": selections, "only": options.only}
            base, head = (assemblies(tree, version, request) for tree in trees)
            total, different = len(head), differences(base, head)
    for (target, name), fields in different.items():
        print(f"{target} {name}: {', '.join(fields)}")
    print(f"{total} variants, {len(different)} different, Triton {version}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
