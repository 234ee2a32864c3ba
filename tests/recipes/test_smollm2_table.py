"""Tests the tables and the picture of the recipe `smollm2`, and that the README's are current."""

import pytest

from lctrain.recipes.smollm2.picture import PANELS, draw
from lctrain.recipes.smollm2.records import mean_scores, read_records, summed_gains
from lctrain.recipes.smollm2.table import PICTURE, README, tables
from tests.numerics import near

MACHINE = {"device": "CPU", "torch": "2.13.0", "date": "2026-11-30", "seconds": 12.3}
WINDOW = 1024


def gain_row(length, gain, low=None, high=None):
    row = {"method": "", "length": length, "items": 2, "gain": gain, "gain_low": low}
    return row | {"gain_high": high, "gain_stderr": 0.0125, "compared_with": length // 2}


def beyond_row(method, length, gain):
    row = {"method": method, "length": length, "gain": gain, "loss": 3.0 - gain}
    return row | {"tokens": 4096, "documents": 1}


def answers(length, score, strict, items, **columns):
    row = {"method": "", "length": length, "score": score, "strict": strict, "items": items}
    return row | columns


def losses(window, long):
    rows = [(WINDOW, window), (2 * WINDOW, long)]
    return [{"length": length, "loss": loss, "tokens": 512} for length, loss in rows]


RECORDS = {
    "gain": {"rows": [gain_row(512, 0.125, 0.1, 0.15), gain_row(1024, 0.0625)]},
    "beyond": {
        "window": WINDOW,
        "rows": [
            beyond_row("plain", 1024, 0.0),
            beyond_row("plain", 2048, -2.5),
            beyond_row("yarn", 1024, 0.0),
            beyond_row("yarn", 2048, 0.0625),
        ],
    },
    "needle": {
        "rows": [answers(1024, 1.0, 1.0, 1, depth=0.0), answers(1024, 1.0, 0.5, 2, depth=1.0)]
    },
    "ruler": {
        "rows": [answers(1024, 0.5, 0.25, 4, task="vt"), answers(1024, 1.0, 1.0, 4, task="cwe")]
    },
    "continue_yarn": {
        "window": WINDOW,
        "long": 2 * WINDOW,
        "steps": 7,
        "before": losses(3.0, 3.5),
        "after": losses(2.5, 2.25),
    },
}
RECORDS = {stage: {"stage": stage, **MACHINE, **record} for stage, record in RECORDS.items()}


@pytest.mark.parametrize(
    "line",
    [
        "**Gain from context**, in nats per token, of 2 novels. CPU, torch 2.13.0, "
        "2026-11-30, 12 s.",
        "| 256 to 512 | +0.1250 | 0.0125 | +0.1000 to +0.1500 |",
        "| 512 to 1,024 | +0.0625 | 0.0125 | needs more novels |",
        "| method | 2,048 |",
        "| `plain` | -2.500 |",
        "| `yarn` | +0.062 |",
        "| all depths | 100% / 67% |",
        "| `vt` | 50% / 25% |",
        "| `yarn` | 7 | -0.5000 | +0.2500 |",
    ],
)
def test_the_tables_hold_what_was_recorded(line):
    assert line in tables(RECORDS).splitlines()


def test_the_time_of_a_stage_that_was_stopped_is_left_out():
    stopped = {"gain": {**RECORDS["gain"], "seconds": None}}
    assert "of 2 novels. CPU, torch 2.13.0, 2026-11-30.\n" in tables(stopped)


def test_the_time_of_continued_training_is_that_of_all_ways():
    ways = {name: {**RECORDS["continue_yarn"], "stage": name} for name in ("continue_dual_chunk",)}
    assert "2026-11-30, 25 s.\n" in tables({**ways, "continue_yarn": RECORDS["continue_yarn"]})


def test_what_is_not_recorded_has_no_table():
    assert "RULER" not in tables({"gain": RECORDS["gain"]})


def test_gains_add_up_and_answers_count_alike():
    assert summed_gains(RECORDS["gain"]) == [(256, 0.0), (512, 0.125), (1024, 0.1875)]
    assert mean_scores(RECORDS["needle"], "strict") == near({("", 1024): 2 / 3})


@pytest.mark.parametrize("stages", [["gain"], ["beyond"], ["gain", "beyond"]], ids="-".join)
def test_the_picture_is_drawn_from_what_is_recorded(stages, tmp_path):
    draw({stage: RECORDS[stage] for stage in stages}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"must hold the stage gain or beyond, got neither\. Run"):
        draw({"ruler": RECORDS["ruler"]}, tmp_path / "picture.png")


def test_the_tables_of_the_readme_are_its_records():
    assert tables(read_records()) in README.read_text()
    assert PICTURE.exists() == any(stage in read_records() for stage in PANELS)
