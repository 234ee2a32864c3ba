"""Tests the loss curves: equal training on and off, the comparison, the record and the picture."""

import json

import numpy as np
import pytest
import torch

from lctrain.bench import curves
from lctrain.bench.shapes import tiny
from tests.float64 import float64_throughout
from tests.numerics import assert_equal_in_float64, near

CPU = torch.device("cpu")


def test_packs_hold_bytes_of_the_standard_library():
    packs = curves.read_packs(3, 128)
    assert len(packs) == 3
    assert all(pack.num_tokens <= 128 for pack in packs)
    assert all(0 <= int(pack.input_ids.min()) <= int(pack.input_ids.max()) < 256 for pack in packs)
    again = curves.read_packs(3, 128)
    for one, two in zip(packs, again, strict=True):
        assert torch.equal(one.input_ids, two.input_ids)


def test_on_and_off_start_from_the_same_loss_and_learn(monkeypatch):
    packs = curves.read_packs(4, 128)
    shape = tiny(curves.llama_100m)
    on, off = (curves.train(kind, 0, shape, packs[:1] * 4, CPU) for kind in ("on", "off"))
    other = curves.train("off", 1, shape, packs[:1] * 4, CPU)
    assert on[-1] < on[0]
    assert off[-1] < off[0]
    assert other[0] != off[0]
    build = curves.CONTENDERS[curves.OURS].__class__.build
    monkeypatch.setattr(
        curves.CONTENDERS["sdpa"].__class__,
        "build",
        lambda self, shape, device, dtype, seed: build(self, shape, device, torch.float64, seed),
    )
    with float64_throughout():
        first = curves.train("on", 0, shape, packs[:1], CPU)
        reference = torch.nn.functional.cross_entropy
        model = curves.CONTENDERS["sdpa"].build(shape, CPU, torch.float64, 0)
        arguments = curves.CONTENDERS["sdpa"].arguments(packs[0])
        labels = torch.cat([arguments.pop("labels")[0, 1:], torch.tensor([-100])])
        expected = reference(model(**arguments).logits[0], labels)
    assert_equal_in_float64(torch.tensor(first[0], dtype=torch.float64), expected.detach())


def test_the_difference_is_compared_with_the_spread():
    off = np.array([[9.0, 9.0, 3.0, 2.0], [9.0, 9.0, 4.0, 3.0]])
    found = curves.compare({"on": (off + 0.25).tolist(), "off": off.tolist()})
    assert found["spread"] == near(1.0)
    assert found["difference"] == near(0.25)
    assert found["within_spread"] is True
    assert found["final_loss_off"] == near(2.5)
    assert curves.compare({"on": (off + 2).tolist(), "off": off.tolist()})["within_spread"] is False


def test_the_command_writes_a_record_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "folder" / "curves.json"
    arguments = ["--tiny", "--steps", "4", "--seeds", "2", "--output", str(output)]
    assert curves.main(arguments) == 0
    record = json.loads(output.read_text())
    assert np.array(record["curves"]["on"]).shape == (2, 4)
    assert record["comparison"]["within_spread"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "--seeds must be at least 2, got 1"),
        (["--tokens", "1"], "--tokens must be at least 2, got 1"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        curves.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_too_few_texts_are_an_error(monkeypatch):
    monkeypatch.setattr(
        curves.StdlibSource, "load", lambda self, folder: {"text": ["a short text", "b"]}
    )
    with pytest.raises(ValueError, match=r"must fill 3 packs of 8 tokens, got 2\. Use fewer"):
        curves.read_packs(3, 8)


def test_without_a_gpu_it_names_the_trial(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert curves.main([]) == 2
    assert "try it with --tiny" in capsys.readouterr().err
