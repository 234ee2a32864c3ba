"""Runs the recipe `smollm2` at its tiny scale, on a random model and made-up novels."""

import json
import random

import pytest

from lctrain.eval import METHODS
from lctrain.recipes.smollm2.__main__ import STAGES, main
from lctrain.recipes.smollm2.model import FILES
from lctrain.recipes.smollm2.novels import HELD_OUT, NOVELS
from lctrain.recipes.smollm2.picture import draw
from lctrain.recipes.smollm2.records import read_records
from lctrain.recipes.smollm2.stages import ANSWERING, document_tokens
from lctrain.recipes.smollm2.table import tables
from lctrain.run.lock import FolderInUseError, FolderLock
from tests.evaluate.conftest import llama_config, save_model

WORDS = ("letter", "captain", "walked", "with", "her", "to", "the", "sea", "in", "rain")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    (folder / "novels").mkdir()
    for number, name in enumerate(NOVELS):
        choose = random.Random(number)
        text = " ".join(choose.choice(WORDS) for _ in range(700))
        (folder / "novels" / f"{name}.txt").write_text(text + ".\n")
    save_model(folder / "model", llama_config(max_position_embeddings=1024))
    return folder


def run(material, out, *stages, more=()):
    main([str(material), "--output", str(out), "--scale", "tiny", "--stages", *stages, *more])
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


@pytest.mark.filterwarnings("ignore")
def test_every_stage_writes_its_record(material, tmp_path):
    found = run(material, tmp_path, *STAGES, more=["--overrides", "trainer.max_steps=1"])
    records = {record["stage"]: record for record in found}
    names = {*STAGES, "continue_dual_chunk", "continue_yarn"} - {"continue"}
    assert records.keys() == names
    for record in records.values():
        assert record["device"] == "CPU"
        assert record["seconds"] > 0
    assert [row["length"] for row in records["gain"]["rows"]] == [512, 1024]
    cells = {(row["method"], row["length"]) for row in records["beyond"]["rows"]}
    assert cells == {(method, length) for method in METHODS for length in (1024, 2048)}
    assert {row["method"] for row in records["needle_beyond"]["rows"]} == set(ANSWERING)
    assert {row["length"] for row in records["ruler"]["rows"]} == {1024}
    for name in ("dual_chunk", "yarn"):
        record = records[f"continue_{name}"]
        assert record["steps"] == len(record["train_loss"]) == 1
        before, after = ({row["length"]: row["loss"] for row in record[w]} for w in WHEN)
        assert before.keys() == after.keys() == {1024, 2048}
        assert before[2048] != after[2048]
    changed = json.loads((tmp_path / "yarn_model" / "config.json").read_text())
    assert changed["rope_parameters"]["factor"] == 2
    text = tables(read_records(tmp_path))
    for title in ("Gain from context", "Beyond the window", "RULER", "Continued training"):
        assert text.count(f"**{title}**") == 1
    assert text.count("**Needles**") == 2
    draw(read_records(tmp_path), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


WHEN = ("before", "after")


@pytest.mark.filterwarnings("ignore")
def test_a_stage_goes_on_after_its_last_finished_cell(material, tmp_path, capsys):
    (first,) = run(material, tmp_path, "gain")
    cells = tmp_path / "gain" / "cells.jsonl"
    lines = cells.read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    lines[-1] = lines[-1].replace('"loss": ', '"loss": 1')  # shows whether it is computed again
    cells.write_text("".join(lines[:-1]))
    (again,) = run(material, tmp_path, "gain")
    assert (again["seconds"], first["seconds"] > 0) == (None, True)
    assert again["rows"] == first["rows"]
    assert json.loads(cells.read_text().splitlines()[-1])["length"] == last["length"]
    cells.write_text("".join(lines))
    (other,) = run(material, tmp_path, "gain")
    assert other["rows"] != first["rows"]


@pytest.mark.filterwarnings("ignore")
def test_a_stage_without_a_finished_cell_begins_anew_unless_it_still_runs(material, tmp_path):
    folder = tmp_path / "needle"
    folder.mkdir()
    (folder / "run.json").write_text("{}")  # a killed process leaves it
    lock = FolderLock(folder)
    with pytest.raises(FolderInUseError):
        run(material, tmp_path, "needle")
    lock.release()
    (record,) = run(material, tmp_path, "needle")
    assert record["rows"]
    assert record["seconds"] > 0


def test_training_with_other_overrides_does_not_mix_with_what_is_there(material, tmp_path):
    (tmp_path / "continue").mkdir()
    (tmp_path / "continue" / "settings.json").write_text('{"training": [], "overrides": []}')
    with pytest.raises(
        ValueError, match=r"had training=\[\] and not \['data.max_tokens=2048', .*Ch"
    ):
        run(material, tmp_path, "continue")
    assert not (tmp_path / "yarn_model").exists()


@pytest.mark.parametrize("missing", ["model/config.json", f"novels/{HELD_OUT}.txt"])
def test_what_was_not_fetched_is_named(tmp_path, missing, material):
    for name in (*(f"model/{name}" for name in FILES), *(f"novels/{name}.txt" for name in NOVELS)):
        if name != missing:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
    name = missing.rpartition("/")[2]
    with pytest.raises(ValueError, match=rf"without {name}. Fetch them: .*fetch {tmp_path}"):
        main([str(tmp_path), "--scale", "tiny", "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_scored_tokens_have_their_context():
    assert document_tokens(1024, 128, 1) == 1025
    assert document_tokens(1024, 128, 3) == 1025 + 256
