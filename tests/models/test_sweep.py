"""Runs a sample of the sweep over all families, and checks the page that the full sweep wrote."""

import pytest
import transformers

from tests.models.family_checks import CHECKS, Verdict
from tests.models.sweep import PAGE, check, classes, families, table

SAMPLE = (  # family, what is special
    ("bert", "encoder"),  # learned positions, told by position_ids alone
    ("cohere2", "causal"),  # layers without rotation
    ("deepseek_v3", "causal"),  # latent attention: values narrower than queries
    ("falcon", "causal"),  # a table of attention classes
    ("gemma3_text", "causal"),  # two rotary embeddings
    ("gemma4_text", "causal"),  # heads of two widths
    ("gpt2", "causal"),  # learned positions
    ("gpt_oss", "causal"),  # sinks
    ("lfm2", "causal"),  # convolutions
    ("mobilebert", "encoder"),  # embeddings that hold the neighbours'
    ("opt", "causal"),  # positions with an offset
    ("qwen3_moe", "causal"),  # experts
    ("qwen3_next", "causal"),  # recurrent layers
)


@pytest.mark.parametrize(("family", "kind"), SAMPLE, ids=[family for family, _ in SAMPLE])
def test_family(family, kind):
    verdict = check(family, classes(kind)[family])
    assert verdict.not_built is None, verdict.not_built
    assert verdict.failures == []
    refused = family in ("falcon", "lfm2", "mobilebert", "qwen3_next")
    assert (verdict.refused is not None) == refused
    if not refused:
        on_pages = verdict.results.pop("beams on pages")
        several_widths = family in ("deepseek_v3", "gemma4_text")
        assert on_pages in (("no",) if several_widths else ("yes", "n/a"))
        assert set(verdict.results.values()) <= {"yes", "n/a"}


def test_the_page_lists_every_family_that_passed():
    text = PAGE.read_text(encoding="utf-8")
    assert "(plain" not in text
    assert "differ by" not in text
    if f"transformers {transformers.__version__}," in text:
        for kind in ("causal", "encoder"):
            missing = [f for f, name in families(kind).items() if f"| {f} | {name} |" not in text]
            assert missing == []


def test_a_wrong_family_is_told():
    results = dict.fromkeys(CHECKS, "yes") | {"packed": "error 3.6e-02 (plain 6.0e-07)"}
    verdict = Verdict("x", "X", by_name="accepted", results=results)
    assert verdict.failures == ["packed: error 3.6e-02 (plain 6.0e-07)", "by name: accepted"]
    assert (
        "| x | X | error 3.6e-02 (plain 6.0e-07) | yes | yes | yes | yes | yes | accepted |"
        in table([verdict])
    )
