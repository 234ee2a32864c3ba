"""Checks every causal language model and encoder of transformers that can be built tiny.

    python -m tests.models.sweep                      # all, and writes docs/model_families.md
    python -m tests.models.sweep llama gemma2 bert    # these, and prints them

Takes about 15 minutes on one core. The exit status is 1 if any check gives a wrong result. CI runs
a sample: tests/models/test_sweep.py.
"""

import argparse
import logging
import platform
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.models.family_checks import CHECKS, TRANSFORMERS_REFUSES, Verdict, check_family

PAGE = Path(__file__).parents[2] / "docs" / "model_families.md"
KINDS = ("causal", "encoder")
KNOWN = {
    "hrm_text": "refused: `attn_implementation='lctrain_flash'` is not supported when",
}
"""Family -> what transformers itself says to our names, which no check of ours can hold back."""
_SIGNS = {"yes": "yes", "no": "no", "n/a": "-"}


def classes(kind: str) -> dict[str, str]:
    """Returns class names by family, for one key of KINDS."""
    from transformers.models.auto import modeling_auto

    return dict(
        {
            "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        }[kind]
    )


def families(kind: str) -> dict[str, str]:
    """Returns class names by family, for one key of KINDS.

    Where several families share a class, the family with the shortest name is kept.
    """
    shortest: dict[str, str] = {}
    for family, name in classes(kind).items():
        shortest[name] = min(shortest.get(name, family), family, key=len)
    return {family: name for name, family in shortest.items()}


def check(family: str, name: str) -> Verdict:
    """Checks one family; see `check_family`."""
    try:
        model_class = getattr(transformers, name)
    except (AttributeError, ImportError) as error:
        return Verdict(family, name, not_built=str(error))
    verdict = check_family(family, model_class)
    if verdict.by_name.startswith(KNOWN.get(family, "\0")):
        verdict.by_name = TRANSFORMERS_REFUSES
    return verdict


def is_wrong(verdict: Verdict) -> bool:
    """Returns whether any check of a family has failed; see Verdict.failures."""
    return bool(verdict.failures)


def table(verdicts: Iterable[Verdict]) -> str:
    """Returns the page's three lists: families served, refused, and not built."""
    verdicts = list(verdicts)
    served = [v for v in verdicts if v.not_built is None and v.refused is None]
    refused = [v for v in verdicts if v.refused is not None]
    unbuilt = [v for v in verdicts if v.not_built is not None]
    heads = ["family", "class", *CHECKS, "by name"]
    lines = [f"### Served ({len(served)})", "", _row(heads), _row(["---"] * len(heads))]
    for verdict in served:
        results = [_sign(verdict.results[check]) for check in CHECKS]
        lines.append(
            _row([verdict.model_type, verdict.model_class, *results, _sign(verdict.by_name)])
        )
    lines += ["", f"### Refused when patched and by name ({len(refused)})", ""]
    lines += [_row(["family", "class", "why", "by name"]), _row(["---"] * 4)]
    for v in refused:
        lines.append(_row([v.model_type, v.model_class, _reason(v.refused or ""), v.by_name]))
    lines += ["", f"### Not built tiny, hence not checked ({len(unbuilt)})", ""]
    lines += [_row(["family", "class", "why"]), _row(["---"] * 3)]
    lines += [_row([v.model_type, v.model_class, _cell(v.not_built or "")]) for v in unbuilt]
    return "\n".join(lines)


def page(verdicts: dict[str, list[Verdict]]) -> str:
    """Returns the whole page, with the families of all kinds."""
    return f"""# Model families

`python -m tests.models.sweep` wrote this page: transformers {transformers.__version__}, torch
{torch.__version__.split("+")[0]}, Python {platform.python_version()}, on the PyTorch path of a CPU.
It builds each family's default config with tiny sizes and random weights, and compares with the
unpatched model in float64. "yes" means an error of at most twice the largest that plain PyTorch's
own attentions make.

- **packed**: documents in one row give the logits that they give one by one.
- **padded right**, **padded left**: logits at real tokens.
- **gradients**: of every parameter, from a pack and from its documents one by one.
- **generate**: the same tokens and logits, greedy, from prompts padded at the left.
- **beams on pages**: the same, by two beams whose keys and values are in a `PagedCache`; compared
  with beams of the unpatched model without a cache.
- **by name**: `attn_implementation="lctrain_flash"` gives the same verdict and the same bits.

"no" is a ValueError that says so: such a model counts positions itself, and reads rows, not packs;
or its layers do not attend to one cache of all keys, or transformers' cache would forget some.
"-" means that the family does not have it, or that transformers fails there too.

## Causal language models

{table(verdicts["causal"])}

## Encoders (masked language models)

{table(verdicts["encoder"])}
"""


def _sign(result: str) -> str:
    return _SIGNS.get(result, "yes" if result == "same" else _cell(result))


def _reason(message: str) -> str:
    """Returns an error message without its remedy."""
    return _cell(message.split(". ")[0])


def _cell(text: str) -> str:
    return text.replace("|", "/")[:160]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    """Runs the sweep; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", nargs="*", help="check only these, and print them")
    chosen = parser.parse_args().family
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    verdicts: dict[str, list[Verdict]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for family, name in families(kind).items():
            if not chosen or family in chosen:
                verdict = check(family, name)
                verdicts[kind].append(verdict)
                print(f"{family}: {'; '.join(verdict.failures) or 'ok'}", flush=True)
    found = [verdict for kind in KINDS for verdict in verdicts[kind]]
    if chosen:
        print(table(found))
    else:
        PAGE.write_text(page(verdicts))
    wrong = [verdict.model_type for verdict in found if is_wrong(verdict)]
    print(f"{len(found)} families, {len(wrong)} wrong{': ' if wrong else ''}{', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
