"""Tests that the files of an evaluation are JSON for every reader, whatever was measured."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lctrain.config import PathsConfig
from lctrain.eval.cells import CellStore
from lctrain.evaluate import evaluate
from tests.strict import parse_files

TABLE = "perplexity_by_length.json"


@pytest.fixture
def nan_folder(model_folder, tmp_path):
    """Returns the folder of a model whose losses are NaN."""
    folder = tmp_path / "nan"
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # transformers may guard torch.nn.init of loaded weights
        model.lm_head.weight.fill_(math.nan)
    model.save_pretrained(folder)
    return folder


def test_every_file_parses_strictly_and_null_is_read_back_as_nan(
    make_config, nan_folder, model_folder, tmp_path, run_main
):
    paths = [tmp_path / name for name in ("a", "b")]
    for folder, path in zip((nan_folder, model_folder), paths, strict=True):
        config = make_config(folder, paths=PathsConfig(output_dir=str(path)), documents=1)
        table = evaluate(config).perplexity
        assert math.isnan(table.rows[0].loss) == (folder == nan_folder)
        found = parse_files(path)
        assert {"cells.jsonl", TABLE, "run.json"} <= found.keys()
    assert parse_files(paths[0])[TABLE]["rows"][0]["loss"] is None
    store = CellStore.read(paths[0], "resume")
    totals = [item.totals["loss"] for result in store.values() for item in result.items]
    assert totals
    assert all(math.isnan(total) for total in totals)
    output = PathsConfig(output_dir=str(paths[0]))
    config = make_config(nan_folder, paths=output, documents=1, resume="x")
    assert math.isnan(evaluate(config).perplexity.rows[0].loss)  # from the file
    run_main(f"compare=[{paths[0]},{paths[1]}]", "name=compared")
    (compared,) = (tmp_path / "outputs" / "compared").iterdir()
    rows = parse_files(compared)["comparison.json"]["rows"]
    assert [row["difference"] for row in rows if row["measure"] == "loss"] == [None, None]
