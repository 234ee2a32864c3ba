"""Differences between the machine code of two commits that count."""

from tests.kernels.compare_code import differences

REPORT = {"registers": 168, "spill_bytes": 0, "shared_bytes": 1024, "machine_code": "a", "key": "1"}
NAME = ("sm_90", "varlen_fwd-D128-causal-bf16-128x64")


def test_equal_code_is_no_difference_whatever_the_key():
    assert differences({NAME: REPORT}, {NAME: REPORT | {"key": "2"}}) == {}


def test_registers_and_instructions_count():
    changed = REPORT | {"registers": 170, "machine_code": "b"}
    assert differences({NAME: REPORT}, {NAME: changed}) == {NAME: ["registers", "machine_code"]}


def test_a_variant_of_one_side_is_named():
    assert differences({NAME: REPORT}, {}) == {NAME: ["only in BASE"]}
    assert differences({}, {NAME: REPORT}) == {NAME: ["only in the working tree"]}


def test_other_assembly_counts():
    base, head = {"assembly": "a"}, {"assembly": "b"}
    assert differences({NAME: base}, {NAME: head}) == {NAME: ["assembly"]}
    assert differences({NAME: base}, {NAME: base}) == {}
