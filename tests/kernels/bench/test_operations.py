"""Tests lctrain-bench ops: equal results of contenders, figures, records and tables."""

import dataclasses

import pytest
import torch

from lctrain_kernels.bench import operation_report, operations
from lctrain_kernels.bench.loss_case import PRODUCTS, LossCase, loss_functions, matrix_products
from lctrain_kernels.bench.measure import measure_call
from lctrain_kernels.bench.operation_cases import CASES, EAGER, LIGER, OURS
from lctrain_kernels.bench.record import BenchmarkRecord, Result
from tests.numerics import assert_equal_in_float64, near

CPU = torch.device("cpu")
SETTING = operations.Setting(rows=8, columns=32, device=CPU, dtype=torch.float32)


def timed_once(call):
    call()
    return 2.0


@pytest.mark.parametrize("name", CASES)
def test_ours_and_pytorch_agree_forward_and_backward(name):
    case = CASES[name]
    results = []
    for contender in (OURS, EAGER):
        leaves = dataclasses.replace(SETTING, dtype=torch.float64).leaves(case)
        outputs = case.contenders[contender](*leaves, *case.constants(leaves))
        outputs = operations._as_tuple(outputs)
        grads = torch.autograd.grad(outputs, leaves, [out.cos().detach() for out in outputs])
        results.append([*outputs, *grads])
    assert_equal_in_float64(*results)


@pytest.mark.parametrize("name", CASES)
def test_results_have_times(name):
    (ours, eager) = operations.time_case(CASES[name], [OURS, EAGER], SETTING, [timed_once])
    assert (ours.status, ours.forward_ms, ours.backward_ms) == ("ok", 2.0, 2.0)
    assert eager.workload == f"{name}_32"


def test_bytes_are_counted_once():
    for name, moves in {"rms_norm": (2, 3), "add_rms_norm": (4, 4), "swiglu": (3, 5)}.items():
        moved = CASES[name].moved_bytes(SETTING.leaves(CASES[name]))
        assert moved == tuple(count * 8 * 32 * 4 for count in moves)
    q, k = SETTING.leaves(CASES["rotary"])
    both = (q.numel() + k.numel()) * 4
    assert CASES["rotary"].moved_bytes([q, k]) == (2 * both, 2 * both)


def test_wrong_results_get_no_figures():
    contenders = {EAGER: lambda x, w: x * w, "wrong": lambda x, w: x * w * 1.1}
    case = dataclasses.replace(CASES["rms_norm"], contenders=contenders)
    (result,) = operations.time_case(case, ["wrong"], SETTING, [timed_once])
    assert result.status == "failed_check"
    assert "differs from PyTorch by 1.0e-01" in result.reason


def test_a_contender_that_cannot_be_captured_gets_the_next_timer():
    def refuses(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    case = CASES["swiglu"]
    (result,) = operations.time_case(case, [OURS], SETTING, [refuses, timed_once])
    assert (result.status, result.reason) == ("ok", "timed without a CUDA graph")
    (result,) = operations.time_case(case, [OURS], SETTING, [refuses])
    assert result.status == "error"
    assert "not permitted" in result.reason


def test_a_library_that_is_not_installed_is_an_error_of_its_own():
    if operations.missing_libraries(CPU).get("liger", "").startswith("ModuleNotFoundError"):
        (result,) = operations.time_case(CASES["rms_norm"], [LIGER], SETTING, [timed_once])
        assert result.status == "error"
    assert set(operations.missing_libraries(CPU)) == set(operations.MODULES)


def test_the_products_of_the_loss_are_its_gradients_shapes():
    hidden, weight, _ = LossCase(40, 96, 32).inputs(CPU, torch.float32)
    matrix_products(hidden.detach(), weight.detach(), frozen=False)()
    matrix_products(hidden.detach(), weight.detach(), frozen=True)()


@pytest.mark.parametrize("frozen", [False, True])
def test_losses_are_timed_in_turns(frozen):
    case = LossCase(40, 96, 32, frozen)
    order = []

    def timer(call):
        call()
        order.append(call)
        return float(len(order))

    names = [OURS, PRODUCTS, "no_such"]
    ours, products, missing = operations.time_losses(case, names, CPU, torch.float32, timer, 3)
    assert [ours.step_ms, products.step_ms] == [3.0, 4.0]
    assert order[0::2] == [order[0]] * 3
    assert (missing.status, missing.peer) == ("error", "no_such")


def test_the_small_setting_gives_the_same_loss():
    functions = loss_functions()
    inputs = LossCase(40, 96, 32).inputs(CPU, torch.float32)
    assert torch.equal(functions[OURS]()(*inputs), functions["lctrain_small"]()(*inputs))


def test_tuples_are_measured():
    x = torch.ones(3, requires_grad=True)
    timing = measure_call(lambda: (x * 2, x * 3), [x], [torch.ones(3)] * 2, timed_once, 1)
    assert timing.forward_ms == 2.0


def record(date="2026-11-30T01:00:00+00:00", workloads=("rms_norm_32",), **settings):
    sizes = {"forward_bytes": 2e9, "backward_bytes": 1e9}
    return BenchmarkRecord(
        device="GPU X",
        date=date,
        versions={"torch": "2.11"},
        settings={
            "dtype": "bfloat16",
            "titles": {"products": "products", "lctrain": "ours", "liger": "Liger"},
            "copy_bytes_per_s": {"256": 3e12, "512": 4e12},
            **settings,
        },
        workloads={name: (sizes if "norm" in name else {"hidden": 32}) for name in workloads},
        results=[
            Result(name, "lctrain", "ok", forward_ms=1.0, backward_ms=0.5, peak_bytes=2**30)
            for name in workloads
            if "norm" in name
        ],
    )


def test_shares_are_of_the_fastest_copy():
    found = record()
    found.results.append(Result("rms_norm_32", "liger", "error", "no"))
    text = operation_report.operation_tables(found)
    assert "copy bandwidth (4,000 GB/s)" in text
    assert "| `rms_norm_32` | 0.50 / 0.50 (1.00) | error |" in text


def test_the_loss_is_compared_with_its_products():
    found = record(workloads=("linear_cross_entropy_32",), missing={"liger": "no module"})
    found.results = [
        Result("linear_cross_entropy_32", "products", "ok", step_ms=80.0),
        Result("linear_cross_entropy_32", "lctrain", "ok", step_ms=84.0, peak_bytes=2**31),
    ]
    text = operation_report.operation_tables(found)
    assert "| `linear_cross_entropy_32` | 80.0 | 84.0, 1.05x (2.00) |" in text
    assert "Not timed: Liger (no module)." in text


def test_records_of_one_kind_are_shown_together(tmp_path):
    assert operation_report.newest_operation_record(tmp_path) is None
    record("2026-11-30T01:00:00+00:00", ("rms_norm_32",)).save(tmp_path / "b.json")
    record("2026-11-30T00:00:00+00:00", ("layer_norm_32", "rms_norm_32")).save(tmp_path / "a.json")
    other = record("2026-11-29T00:00:00+00:00", ("add_rms_norm_32",))
    dataclasses.replace(other, device="GPU Y").save(tmp_path / "c.json")
    found = operation_report.newest_operation_record(tmp_path)
    assert list(found.workloads) == ["rms_norm_32", "layer_norm_32"]
    assert [result.workload for result in found.results] == ["rms_norm_32", "layer_norm_32"]


def test_the_command_writes_a_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "ops.json"
    arguments = ["--tiny", "--contenders", "lctrain,torch,products", "--repetitions", "1"]
    arguments += ["--operations", "linear_cross_entropy,rms_norm"]
    assert operations.main([*arguments, "--output", str(output)]) == 0
    found = BenchmarkRecord.load(output)
    assert list(found.workloads) == [
        "linear_cross_entropy_32",
        "linear_cross_entropy_32_frozen",
        "rms_norm_32",
    ]
    assert found.settings["dtype"] == "float32"
    assert found.settings["copy_bytes_per_s"]["1"] > 0
    assert "Wrote" in capsys.readouterr().out


def test_without_a_gpu_it_names_the_trial(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert operations.main([]) == 2
    assert "try it with --tiny" in capsys.readouterr().err


def test_unknown_operations_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        operations.parse_arguments(["--operations", "softmax"])
    assert "operations must be among linear_cross_entropy, rms_norm" in capsys.readouterr().err


def test_a_share_at_the_bar_is_shown_as_it_is():
    found = record(copy_bytes_per_s={"256": 2e9 / 0.00085})
    text = operation_report.operation_tables(found)
    assert float(text.partition("`rms_norm_32` | ")[2].split(" ")[0]) == near(0.85)
