"""Properties of every attention in a model: isolation, prefill in pieces, compilation, waits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lctrain.models import patch_model
from tests.models.families import VOCABULARY, exact_gradients, gradients, packed_outputs
from tests.numerics import assert_error_at_most_twice, assert_errors_at_most_twice


def assert_others_keep_every_bit(model, documents: Sequence[Tensor], **options: Any) -> None:
    """Changes the third document; all others must keep their outputs and input gradients.

    Args:
        model: A causal language model.
        documents: Token ids of at least three documents.
        **options: Options of patch_model.
    """
    changed = [tokens.clone() for tokens in documents]
    changed[2] = 3 + (changed[2] + 1 - 3) % (VOCABULARY - 3)
    found = []
    with patch_model(model, **options):
        for texts in (documents, changed):
            embeddings = model.get_input_embeddings()(torch.cat(texts)[None]).detach()
            embeddings.requires_grad_()
            out = packed_outputs(model, texts, input_ids=None, inputs_embeds=embeddings)
            out.square().sum().backward()
            found.append(torch.cat([out.detach(), embeddings.grad[0]], -1))
    start = sum(map(len, documents[:2]))
    inside = torch.zeros(len(found[0]), dtype=torch.bool)
    inside[start : start + len(documents[2])] = True
    assert torch.equal(found[0][~inside], found[1][~inside])
    assert not torch.equal(found[0][inside], found[1][inside])


def logits_in_pieces(model, input_ids: Tensor, mask: Tensor, sizes: Sequence[int]) -> Tensor:
    """Returns the logits [B, S, V] of rows that are fed to a cache piece by piece.

    Args:
        model: A causal language model.
        input_ids: [B, S] int64.
        mask: [B, S], 0 at padding.
        sizes: Tokens of each piece; they sum to S.
    """
    found, cache = [], None
    for piece in torch.arange(input_ids.shape[1]).split(list(sizes)):
        out = model(
            input_ids[:, piece],
            attention_mask=mask[:, : piece[-1] + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def assert_compiles_without_breaks(
    model, packings: Sequence[Sequence[Tensor]], **options: Any
) -> None:
    """Compiles the model into one graph, and compares outputs and gradients of every pack."""
    torch._dynamo.reset()
    with patch_model(model, **options):
        expected = [gradients(model, lambda d=d: packed_outputs(model, d)) for d in packings]
        dual_chunk = options.get("attention") == "dual_chunk"
        exact = exact_gradients(model, packings, float32_frequencies=dual_chunk)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for documents, plain, reference in zip(packings, expected, exact, strict=True):
            found = gradients(model, lambda d=documents: packed_outputs(compiled, d))
            assert_error_at_most_twice(found[0], plain[0], reference[0], "outputs")
            assert_errors_at_most_twice(found[1], plain[1], reference[1])


def assert_never_waits(step: Callable[[], None]) -> None:
    """Calls `step` twice; the second call must not synchronise with the GPU."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_generates_as_the_whole(model, prompt: Tensor, **options: Any) -> None:
    """Decodes on a cache; logits have at most twice the error of one forward over the text.

    Args:
        model: A causal language model in low precision.
        prompt: [1, S] int64.
        **options: Options of patch_model.
    """
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    exact = copy.deepcopy(model).double()
    with patch_model(model, **options), patch_model(exact, **options), torch.no_grad():
        result = model.generate(
            prompt, **settings, output_logits=True, return_dict_in_generate=True
        )
        whole, reference = (
            m(result.sequences).logits[0, prompt.shape[1] - 1 : -1] for m in (model, exact)
        )
    assert_error_at_most_twice(torch.cat(result.logits), whole, reference)
