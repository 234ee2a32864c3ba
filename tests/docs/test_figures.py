"""Tests that each figure in the documents comes from a record, or is listed with a reason."""

import json
import re
from pathlib import Path

import pytest

from lctrain_kernels.bench.newest import records_of
from tests.docs.test_pages import PAGES
from tests.house.typecheck import ROOT

UNITS = r"(?:%|x\b|ms\b|µs\b|s\b|min\b|tokens/s|GiB|MiB|GB\b|MB\b|TFLOP/s|times\b)"
FIGURE = re.compile(rf"(?<![\w.])\d[\d,]*(?:\.\d+)?\s?{UNITS}")
GENERATED = re.compile(r"<!-- [^>]*tables: begin.*?tables: end -->", re.DOTALL)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
RECIPES = ROOT / "recipes"
DOCUMENTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")),
    ROOT / "kernels" / "lctrain_kernels" / "README.md",
    *sorted(RECIPES.glob("*/README.md")),
]

# Figures that are no measurement: figure -> reason.
ALLOWED = {
    "docs/benchmarks.md": {
        "10 %": "a setting of the workload: dropout_p=0.1",
        "2.5 times": "the FLOP formula: five products for two",
    },
    "docs/guides/extend.md": {"16 times": "the range of the picture, a setting of the recipe"},
    "docs/guides/pretrain.md": {"64 MiB": "the default of data.window_bytes"},
    "recipes/differential/README.md": {
        "80GB": "the name of the GPU",
        "80 GB": "the memory of that GPU",
    },
    "recipes/dual_chunk_extension/README.md": {"14 MB": "a setting of the stages"},
}


def load(*path: str) -> dict:
    return json.loads(RECIPES.joinpath(*path).read_text())


def figures(text: str) -> list[str]:
    """Returns all figures with a unit, except those in code and generated tables."""
    prose = CODE.sub("", GENERATED.sub("", text))
    return [" ".join(found[0].split()) for found in FIGURE.finditer(prose)]


def step_times() -> dict[tuple[str, str, bool], float | None]:
    """Returns the newest milliseconds by (contender, workload, checkpointing)."""
    times: dict[tuple[str, str, bool], float | None] = {}
    for name in ("step.json", "step_checkpointing.json"):
        for run in load("differential", "results", name)["results"]:
            key = (run["contender"], run["workload"], run["checkpointing"])
            times[key] = run["step_ms"]
    return times


def step_rows() -> list[str]:
    """Returns the rows that the recipe's table of training steps must have."""
    times, rows = step_times(), []
    columns = [("mix32k", False), ("1x32k", False), ("mix32k", True)]
    for contender in dict.fromkeys(name for name, *_ in times):
        cells = []
        for column in columns:
            if (contender, *column) not in times:
                cells.append("")
                continue
            time, plain = times[(contender, *column)], times[("plain", *column)]
            if time is None:
                cells.append("out of memory")
            elif contender == "plain":
                cells.append(f"{time:,.0f} ms")
            else:
                cells.append(f"{time:,.0f} ms ({time / plain:.2f}x)")
        rows.append(re.sub(r" +", " ", f"| `{contender}` | {' | '.join(cells)} |"))
    return rows


def quality_rows() -> list[str]:
    """Returns the rows that the recipe's table of the three models must have."""
    rows = []
    for name, title in (("plain", "plain"), ("v1", "V1"), ("v2", "V2")):
        of = load("differential", "results", "differential.json")["summary"][name]

        def cell(key: str, form: str, of: dict = of) -> str:
            value = of.get(key)
            if value is None:
                return ""
            return f"{value['mean']:{form}} ± {value['standard_error']:{form}}"

        keys = of["passkeys"]["2048"]
        found = f"{keys['mean'] * 100:.0f} % ± {keys['standard_error'] * 100:.0f} %"
        difference = "" if name == "plain" else cell("held_out_loss_difference", ".3f")
        cells = [cell("held_out_loss", ".3f"), difference, cell("largest_logit", ".0f"), found]
        cells.append(cell("key_loss", ".2f"))
        rows.append(re.sub(r" +", " ", f"| {title} | {' | '.join(cells)} |"))
    return rows


def derived() -> dict[str, set[str]]:
    """Returns the figures in the recipes' prose, computed from their records."""
    times = step_times()
    parity = load("differential", "results", "parity.json")
    apart = parity["largest_difference_to_two_calls_with_sdpa"]["float32"]
    train = load("dual_chunk_extension", "results", "train.json")
    speed = train["tokens_per_second"]
    rows, one = "transformers_rows", "1x32k"
    worst = max(times[("v1", *column)] / times[("plain", *column)] for column in _V1_COLUMNS)
    assert worst < 1.15
    found = load("differential", "results", "differential.json")["summary"]
    learnt = [x for of in found.values() for x in of["passkeys"]["2048"]["values"] if x > 0]
    return {
        "recipes/differential/README.md": {
            f"{max(learnt) * 100:.0f} %",
            "15 %",
            f"{apart['one launch'] / apart['two calls, eager']:.1f} times",
            f"{times['transformers_as_it_comes', 'mix32k', True] / times['v1', 'mix32k', True]:.1f}"
            " times",
            f"{times[rows, 'mix32k', False] / times['v1', 'mix32k', False]:.2f} times",
            f"{times[rows, one, False] / times['v1', one, False]:.2f} times",
        },
        "recipes/dual_chunk_extension/README.md": {
            f"{speed:,.0f} tokens/s",
            f"{train['steps'] * 32_768 / speed:.0f} s",
            *passkey_figures(),
        },
    }


_V1_COLUMNS = [("mix32k", False), ("1x32k", False), ("mix32k", True)]


def passkey_figures() -> set[str]:
    """Returns the shares of passkeys found, in percent: means over depths and single depths."""
    lines = (RECIPES / "dual_chunk_extension" / "results" / "passkey_retrieval.csv").read_text()
    cells: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for line in lines.splitlines()[1:]:
        method, length, _, found, keys, _ = line.split(",")
        cells.setdefault((method, length), []).append((int(found), int(keys)))
    sums = [tuple(map(sum, zip(*cell, strict=True))) for cell in cells.values()]
    means = {f"{100 * found / keys:.0f} %" for found, keys in sums}
    single = {f"{100 * found / keys:.0f} %" for cell in cells.values() for found, keys in cell}
    return means | single


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_figure_is_typed_in(page: Path):
    name = str(page.relative_to(ROOT))
    text = page.read_text()
    for row in [*step_rows(), *quality_rows()] if "differential/" in name else []:
        text = text.replace(row, "")
    known = {*ALLOWED.get(name, {}), *derived().get(name, set())}
    assert not [figure for figure in figures(text) if figure not in known]


def test_the_tables_of_the_differential_recipe_are_its_records():
    text = (RECIPES / "differential" / "README.md").read_text()
    assert not [row for row in [*step_rows(), *quality_rows()] if row not in text]


def test_every_allowed_figure_is_printed():
    for name, entries in ALLOWED.items():
        printed = figures((ROOT / name).read_text())
        assert not [figure for figure in entries if figure not in printed], name


def test_a_figure_is_seen():
    text = "Twice as fast: 3.5x, 12 ms and 7 %.\n```\n9 ms\n```\n"
    assert figures(text) == ["3.5x", "12 ms", "7 %"]


def test_the_readme_has_the_speeds_of_the_newest_records():
    readme = (ROOT / "README.md").read_text()
    sft = newest_runs("sft")
    ours, theirs = (sft[name, None]["trained_tokens_per_s"] for name in ("lctrain", "trl_packed"))
    title = "| fine-tuning, Qwen3-1.7B shape |"
    assert f"{title} | {ours / theirs:.2f} | |" in readme
    runs = newest_runs("memory", "fa4_liger")
    short, long, longest = (
        runs["lctrain", tokens]["tokens_per_s"] / runs["fa4_liger", tokens]["tokens_per_s"]
        for tokens in (32_768, 131_072, 262_144)
    )
    ratios = f"{short:.2f} (128k: {long:.2f}, 256k: {longest:.2f})"
    row = f"| step with LoRA, Llama-3.1-8B shape | {ratios} | | |"
    assert row in readme


def test_the_readme_has_the_speed_of_generation():
    both = ("graphs", "padded")
    cases = [record["cases"]["batch"] for record in records_of("generation")]
    case = [one for one in cases if one["results"].keys() >= set(both)][-1]
    ours, theirs = (case["results"][name]["tokens_per_s"] for name in both)
    row = f"| generation, {case['shape']} shape | | {ours / theirs:.1f} | |"
    readme = (ROOT / "README.md").read_text()
    assert row in readme
    assert f"Generation for {case['requests']} prompts" in readme


def newest_runs(kind: str, contender: str | None = None) -> dict:
    """Returns the fastest run by (contender, tokens) of the newest record that has it.

    Args:
        kind: Kind of the record.
        contender: Only records with a run of this contender count.
    """
    runs: dict = {}
    for record in records_of(kind):
        found = sorted(record["runs"], key=lambda run: run.get("tokens_per_s", 0))
        names = [run.get("contender", "lctrain") for run in found]
        if contender is None or contender in names:
            tokens = [run.get("tokens") for run in found]
            runs.update(zip(zip(names, tokens, strict=True), found, strict=True))
    assert runs
    return runs
