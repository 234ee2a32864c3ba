"""Checks one model family: packs, padding, generation, gradients, patching and loading by name.

A family is served if `patch_model` accepts it. Its numbers are then compared with the unpatched
model's in float64, by the rule of tests/numerics.py. The same model loaded with
attn_implementation="lctrain_flash" must be accepted or refused alike, and give the same bits.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lctrain.generation.paged_cache import PagedCache
from lctrain.models import patch_model
from tests.models.families import gradients, outputs, packed_outputs, padded, separate_outputs
from tests.models.tiny import VOCABULARY, tiny_model
from tests.numerics import error_ratio

LENGTHS = (6, 1, 13, 9)  # a single token among them; longer than the windows of tiny_config
NEW_TOKENS = 5
TRANSFORMERS_REFUSES = "no: transformers refuses the name"
CHECKS = ("packed", "padded right", "padded left", "gradients", "generate", "beams on pages")


REFUSALS = ("a PagedCache must be for", "sliding_window must be None in the config")
"""Beginnings of errors that say which cache a model cannot have."""


@dataclass
class Verdict:
    """Result of all checks of one family.

    Attributes:
        model_type: Model type in its config.
        model_class: Name of its class.
        refused: Error message of patch_model; None if it accepts the family.
        by_name: "same" if loading by name is accepted or refused alike, with the same bits;
            otherwise the difference.
        results: Result by check: "yes" if right, "no" if the call raises an error that says so,
            "n/a" if the family lacks the feature; otherwise a description of the fault.
        not_built: Why no tiny model could be made; then no check was run.
    """

    model_type: str
    model_class: str
    refused: str | None = None
    by_name: str = ""
    results: dict[str, str] = field(default_factory=dict)
    not_built: str | None = None

    @property
    def failures(self) -> list[str]:
        """Checks with a wrong result, or with an error that does not say what is unsupported."""
        found = [f"{check}: {text}" for check, text in self.results.items()]
        found.append(f"by name: {self.by_name}")
        right = (": yes", ": same", ": n/a", ": no", ": ", TRANSFORMERS_REFUSES)
        return [text for text in found if not text.endswith(right)]


def check_family(model_type: str, model_class: type) -> Verdict:
    """Builds a tiny model of a family and runs every check on it."""
    verdict = Verdict(model_type, model_class.__name__)
    try:
        model = tiny_model(model_type, model_class)
        with torch.no_grad():
            outputs(model, input_ids=_documents()[0][None], use_cache=False)
    except Exception as error:
        verdict.not_built = f"{type(error).__name__}: {_first_line(error)}"
        return verdict
    try:
        handle = patch_model(model)
    except ValueError as error:
        verdict.refused = _first_line(error)
    else:
        handle.unpatch()
        verdict.results = {check: _attempt(CHECKERS[check], model) for check in CHECKS}
    verdict.by_name = _attempt(_by_name, model_type, model_class, model, verdict.refused)
    return verdict


def _attempt(check: Callable[..., str], *arguments: Any) -> str:
    try:
        return check(*arguments)
    except Exception as error:
        message = _first_line(error)
        if "counts them itself" in message or message.startswith(REFUSALS):
            return "no"  # refused in so many words
        return f"{type(error).__name__}: {message}"


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def _check_packed(model: nn.Module) -> str:
    documents = _documents()
    reference = separate_outputs(_exact(model), documents)
    with patch_model(model):
        found = packed_outputs(model, documents)
    return _judge(found, [separate_outputs(m, documents) for m in _plain(model)], reference)


def _check_padded(side: str) -> Callable[[nn.Module], str]:
    @torch.no_grad()
    def check(model: nn.Module) -> str:
        documents = _documents()
        rows, mask = padded(documents, side)
        inputs, real = {"input_ids": rows, "attention_mask": mask}, mask.bool()
        with patch_model(model):
            found = outputs(model, **inputs)[real]
        plain = [outputs(m, **inputs)[real] for m in _plain(model)]
        reference = outputs(_exact(model), **inputs)[real]
        if not reference.isfinite().all():  # eager attention in float64, with windows
            reference = separate_outputs(_exact(model), documents)
        return _judge(found, plain, reference)

    return check


def _check_gradients(model: nn.Module) -> str:
    documents = _documents()
    with patch_model(model):
        _, found = gradients(model, lambda: packed_outputs(model, documents))
    plain = [gradients(m, lambda m=m: separate_outputs(m, documents))[1] for m in _plain(model)]
    exact = _exact(model)
    _, reference = gradients(exact, lambda: separate_outputs(exact, documents))
    missing = sorted(reference.keys() ^ found.keys())
    if missing:
        return f"other parameters have gradients: {', '.join(missing)[:100]}"
    names = sorted(reference)
    return _judge(_flat(found, names), [_flat(p, names) for p in plain], _flat(reference, names))


def _check_generate(on_pages: bool) -> Callable[[Any], str]:
    @torch.no_grad()
    def check(model: Any) -> str:
        if not model.can_generate():
            return "n/a"
        rows, mask = padded(_documents((7, 4)), "left")
        options = {
            "attention_mask": mask,
            "max_new_tokens": NEW_TOKENS,
            "min_new_tokens": NEW_TOKENS,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "pad_token_id": 0,
            "num_beams": 2 if on_pages else 1,
        }
        whole = options | ({"use_cache": False} if on_pages else {})
        try:
            plain = [m.generate(rows, **whole) for m in _plain(model)]
            exact = _exact(model).generate(rows, **whole)
        except Exception:
            return "n/a"  # transformers cannot, either
        with patch_model(model):
            if on_pages:
                options["past_key_values"] = PagedCache(model)
            found = model.generate(rows, **options)
        if not all(torch.equal(made.sequences, plain[0].sequences) for made in plain):
            return "n/a"  # a tie that rounding breaks
        if not torch.equal(found.sequences, plain[0].sequences):
            return "other tokens"
        if not torch.equal(exact.sequences, plain[0].sequences):
            return "yes"  # eager attention in float64 gives NaN at padding: the tokens must do
        logits = [torch.cat(made.logits) for made in (found, exact, *plain)]
        return _judge(logits[0], logits[2:], logits[1])

    return check


CHECKERS: dict[str, Callable[[Any], str]] = {
    "packed": _check_packed,
    "padded right": _check_padded("right"),
    "padded left": _check_padded("left"),
    "gradients": _check_gradients,
    "generate": _check_generate(on_pages=False),
    "beams on pages": _check_generate(on_pages=True),
}


@torch.no_grad()
def _by_name(model_type: str, model_class: type, model: nn.Module, refused: str | None) -> str:
    """Compares loading with attn_implementation="lctrain_flash" with patch_model, bit for bit."""
    documents = _documents()
    positions = torch.cat([torch.arange(len(tokens)) for tokens in documents])[None]
    rows, mask = padded(documents, "left")
    calls = {
        "packs": lambda m: packed_outputs(m, documents),
        "packs told by position_ids": lambda m: outputs(
            m, input_ids=torch.cat(documents)[None], position_ids=positions
        ),
        "padded rows": lambda m: outputs(m, input_ids=rows, attention_mask=mask)[mask.bool()],
    }
    try:
        named = tiny_model(model_type, model_class, attn_implementation="lctrain_flash")
    except ValueError as error:
        if refused is not None:
            return "same"
        return f"refused: {_first_line(error)}"
    if refused is not None:
        return "accepted"
    for name, call in calls.items():
        with patch_model(model):
            expected = _result(call, model)
        found = _result(call, named)
        if isinstance(found, str) or isinstance(expected, str):
            if found != expected:
                return f"{name}: {found}, patched: {expected}"
        elif not torch.equal(found, expected):
            return f"{name} differ by {float((found - expected).abs().max()):.1e}"
    return "same"


def _result(call: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor | str:
    """Returns the result of a call, or the first line of its error."""
    try:
        return call(model)
    except (TypeError, ValueError) as error:
        return _first_line(error)


def _flat(grads: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([grads[name].flatten() for name in names])


def _exact(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def _plain(model: Any) -> Iterator[nn.Module]:
    """Yields the model under each of its PyTorch attentions, whose rounding differs."""
    yield model
    for name in ("eager", "sdpa"):
        other = copy.deepcopy(model)
        if name == model.config._attn_implementation:
            continue
        try:
            other.set_attn_implementation(name)
        except ValueError:
            continue
        yield other


def _judge(found: Tensor, plain: list[Tensor], reference: Tensor) -> str:
    """Returns "yes" if the error is at most twice the largest of the plain attentions."""
    finite = [tensor for tensor in plain if tensor.isfinite().all()]
    ratios = [error_ratio(found, tensor, reference.double()) for tensor in finite]
    if any(ratio.passes for ratio in ratios):
        return "yes"
    ratio = min(ratios, key=lambda ratio: max(ratio.norm, ratio.maximum))
    return (
        f"error {ratio.actual_norm:.1e} (plain {ratio.plain_norm:.1e}, "
        f"ratio {ratio.norm:.1f} / {ratio.maximum:.1f})"
    )
