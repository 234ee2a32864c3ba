"""Keeps the ahead-of-time reports of kernels whose source has changed but not their assembly.

`python -m tests.kernels.carry_reports BASE` compares the assembly of all variants with the commit
BASE. A variant with unchanged assembly keeps BASE's report, under its new key. `aot_process`
compiles the remaining variants.
"""

import argparse
import tempfile
from pathlib import Path

from tests.house.typecheck import ROOT
from tests.kernels.aot_process import SELECTIONS, kept_reports, update
from tests.kernels.compare_code import assemblies, kept, unpack


def carried(
    base: dict[tuple[str, str], dict], head: dict[tuple[str, str], dict], known: dict[str, dict]
) -> dict[str, dict]:
    """Returns BASE's reports of variants with equal assembly, by the working tree's keys.

    Args:
        base: Lines of assembly_of.py for BASE, by target and name.
        head: Lines of assembly_of.py for the working tree, by target and name.
        known: BASE's reports by BASE's keys.
    """
    by_code = {
        (target, line["assembly"]): known[line["key"]]
        for (target, _), line in base.items()
        if line["key"] in known
    }
    return {
        line["key"]: by_code[target, line["assembly"]]
        | {"key": line["key"], "name": name, "spill_free": line["spill_free"]}
        for (target, name), line in head.items()
        if (target, line["assembly"]) in by_code
    }


def main() -> None:
    """Brings the reports up to date; compiles only variants whose assembly has changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--triton", nargs="*", default=list(SELECTIONS), choices=list(SELECTIONS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        unpack(options.base, tree)
        for version in options.triton:
            request = {"selections": SELECTIONS[version]}
            base, head = (assemblies(root, version, request) for root in (tree, ROOT))
            reports = carried(base, head, kept(tree, version))
            total, compiled = update(version, reports | kept_reports(version))
            print(f"Triton {version}: {total} variants, {compiled} compiled", flush=True)


if __name__ == "__main__":
    main()
