"""Tests which differences compare_code finds, and whose reports carry_reports keeps."""

from tests.kernels.carry_reports import carried
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


def test_a_report_is_carried_where_the_assembly_is_equal():
    lines = {"key": "old", "assembly": "a", "spill_free": False}
    base = {("sm_90", "before"): lines, ("sm_80", "before"): lines | {"key": "none"}}
    head = {
        ("sm_90", "after"): lines | {"key": "new", "spill_free": True},
        ("sm_90", "other"): lines | {"key": "other", "assembly": "b"},
        ("sm_80", "after"): lines | {"key": "of another GPU"},
    }
    known = {"old": REPORT | {"key": "old", "name": "before", "spill_free": False}}
    expected = REPORT | {"key": "new", "name": "after", "spill_free": True}
    assert carried(base, head, known) == {"new": expected}
