"""Tests that messages write a single thing in the singular."""

import pytest

from lctrain import PackedBatch
from lctrain.data.packing import PackingReport
from lctrain.failure import shorten
from lctrain.limits import check_warmup
from lctrain.pluralize import pluralize
from lctrain.report import describe_rows


@pytest.mark.parametrize(
    ("number", "expected"),
    [(0, "0 held-out tokens"), (1, "1 held-out token"), (2000, "2,000 held-out tokens")],
)
def test_a_noun_agrees_with_its_number(number, expected):
    assert pluralize(number, "held-out token") == expected


def test_one_document_of_one_token_is_written_in_the_singular():
    report = PackingReport(
        rows=1, max_tokens=8, documents=1, pieces=1, tokens=1, truncated_tokens=1
    )

    assert str(report).startswith("1 row of 8: 1 token of 1 document, fill")
    assert "(1 token lost)" in str(report)
    assert describe_rows(report).startswith("1 token of 1 document, in rows")
    assert repr(PackedBatch.from_documents([[5]])).startswith("PackedBatch(1 document, 1 token,")


def test_messages_of_one_step_and_one_line_are_in_the_singular():
    with pytest.raises(ValueError, match="at most the 1 step of the run, got 2"):
        check_warmup(2, 1)
    assert shorten("\n".join(map(str, range(10)))).endswith("\n... and 2 more lines")
