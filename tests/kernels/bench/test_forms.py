"""Tests the benchmark of forms on a CPU, with calls that are no kernels."""

import contextlib

import pytest
import torch

from lctrain_kernels.bench import forms
from lctrain_kernels.bench.accuracy import ErrorRatio
from lctrain_kernels.bench.workloads import Workload

CPU = torch.device("cpu")
SHORT = Workload("short", (40, 7), 2, 1, 16)
GRADIENT = torch.arange(1.0, 5.0)


def subject_of(results, ratios=None):
    """Returns a Subject whose form `name` gives the gradient results[name]."""
    active = []

    @contextlib.contextmanager
    def form(name):
        active.append(name)
        yield
        active.pop()

    def errors(workload, device):
        ratio = (ratios or {}).get(active[-1], 1.0)
        return {"dq": ErrorRatio(ratio, 1.0, ratio, ratio)}

    def prepare(workload, device):
        def ours():
            found = results[active[-1]]
            if isinstance(found, Exception):
                raise found
            return (found,)

        return ours, lambda: (GRADIENT,)

    overrides = {name: lambda name=name: form(name) for name in results}
    return forms.Subject({SHORT.name: SHORT}, overrides, prepare, errors, "peer")


def timed(subject, rounds=3):
    clock = iter(range(100))
    rows = forms.time_forms(
        subject, SHORT, list(subject.forms), CPU, lambda call: (call(), next(clock))[1], rounds
    )
    return {row["form"]: row for row in rows}


def test_forms_and_peer_take_turns():
    rows = timed(subject_of({"a": GRADIENT, "b": GRADIENT * 1.001}))
    assert {name: row["rounds"] for name, row in rows.items()} == {
        "a": [0, 3, 6],
        "b": [1, 4, 7],
        "peer": [2, 5, 8],
    }
    assert rows["b"]["ms"] == 4
    assert (rows["a"]["same_bits"], rows["b"]["same_bits"]) == ([True], [False])
    assert 0 < rows["b"]["difference"] < forms.MAX_DIFFERENCE


def test_a_wrong_form_has_a_reason_and_no_times():
    results = {
        "right": GRADIENT,
        "other": -GRADIENT,
        "inexact": GRADIENT,
        "fails": RuntimeError("no registers"),
    }
    rows = timed(subject_of(results, {"inexact": 2.5}))
    assert "ms" in rows["right"]
    for name, reason in {
        "other": "differs from right by 2.0e",
        "inexact": "error above twice that of plain PyTorch",
        "fails": "no registers",
    }.items():
        assert reason in rows[name]["error"]
        assert "ms" not in rows[name]


def test_cases_on_the_command_line():
    known = {"attention": subject_of({"a": GRADIENT, "b": GRADIENT})}
    assert forms.parse_case("attention:short", known) == ("attention", "short", ["a", "b"])
    assert forms.parse_case("attention:short:b", known) == ("attention", "short", ["b"])
    for text, message in {
        "norm:short": "subject must be one of attention, got 'norm'",
        "attention:long": "workload must be one of short, got 'long'",
        "attention:short:a,c": "form must be one of a, b, got 'c'",
    }.items():
        with pytest.raises(ValueError, match=message):
            forms.parse_case(text, known)


def test_every_form_is_another_one():
    """Reads what each override of the kernels' forms leaves in force."""
    from lctrain_kernels.differential.hopper_support import backward_tile
    from lctrain_kernels.dual_chunk.hopper_support import backward_form
    from lctrain_kernels.gluon import config

    chosen = {
        "dual_chunk": lambda: backward_form(128, 4096, 1),
        "varlen": lambda: config.backward_tile(128, False, True),
        "differential": lambda: backward_tile(128, 128, True),
    }
    for name, subject in forms.subjects().items():
        found = []
        for override in subject.forms.values():
            with override():
                found.append(chosen[name]())
        assert len(set(found)) == len(found) > 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="times the kernels on a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert forms.main(["--out", str(tmp_path / "x.json"), "--cases", "varlen:16x2k"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
