"""Tests generation in bfloat16 on a GPU: joined products, and PagedCache with beams and samples.

Log-probabilities of the chosen tokens are compared, not tokens, which nearly equal logits decide.
"""

import copy

import pytest
import torch

import lctrain
from lctrain.batch import PackedBatch
from lctrain.models import fused_modules
from lctrain.models.differential import to_differential
from tests.numerics import assert_error_at_most_twice

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * i * i + 3 * i) % 90 + 3 for i in range(length)] for length in (70, 9, 130, 64)]
ATTENTIONS = {
    "flash": {},
    "dual_chunk": {"chunk_size": 48, "local_size": 16},
    "differential": {},
}


@pytest.fixture
def make(make_llama, device):
    """Returns make(attention): a tiny Llama in bfloat16 on the GPU, which never ends."""

    def made(attention="flash"):
        model = make_llama()
        if attention == "differential":
            model = to_differential(model).eval()
            for name, weight in model.named_parameters():
                if "lambda_proj" in name or "q_proj" in name:
                    torch.nn.init.normal_(weight, std=0.3)
        model.generation_config.eos_token_id = model.config.eos_token_id = None
        return model.to(device, torch.bfloat16)

    return made


def log_probs(model, rows, begins):
    """Returns log-probabilities of the tokens of each row from `begins` on, by a packed forward."""
    device = next(model.parameters()).device
    batch = PackedBatch.from_documents([torch.tensor(row) for row in rows]).to(device)
    with torch.no_grad():
        logits = model(**batch.model_kwargs()).logits[0].cpu()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    found = []
    for row, begin, of in zip(rows, begins, logits.split([len(r) for r in rows]), strict=True):
        chosen = torch.tensor(row[begin:])[:, None]
        found.append(of[begin - 1 : -1].log_softmax(-1).gather(-1, chosen)[:, 0])
    return found


def both_references(model, rows, begins, **patch):
    """Returns log_probs of a training forward in bfloat16, and of one in float64 on the CPU."""
    exact = copy.deepcopy(model).cpu().double()
    with lctrain.patch_model(model, **patch):
        plain = log_probs(model, rows, begins)
    with lctrain.patch_model(exact, **patch):
        return plain, log_probs(exact, rows, begins)


@pytest.fixture
def reorderings(monkeypatch):
    """Lists whether each reordering left all pages as they were, and allocated less than one."""
    seen = []
    reorder = lctrain.PagedCache.reorder_cache

    def watched(cache, beam_idx):
        before = cache._rows.pool._storage
        bits = before.view(torch.int16).clone()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        reorder(cache, beam_idx)
        allocated = torch.cuda.max_memory_allocated() - allocated
        after = cache._rows.pool._storage
        same = after.data_ptr() == before.data_ptr()
        same = same and torch.equal(after.view(torch.int16), bits)
        seen.append((same, allocated < before.nbytes // cache._rows.pool.pages))

    monkeypatch.setattr(lctrain.PagedCache, "reorder_cache", watched)
    return seen


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_joined_products(make, monkeypatch, cuda_graphs):
    joined = []
    merged = fused_modules.merged_linear
    monkeypatch.setattr(
        fused_modules, "merged_linear", lambda x, *w: (joined.append(len(w)), merged(x, *w))[1]
    )
    model = make()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    options = {"temperature": 0, "cuda_graphs": cuda_graphs}
    with lctrain.patch_model(model, fused=True):
        lctrain.generate(model, PROMPTS, max_new_tokens=3, **options)  # cuBLAS keeps a workspace
        allocated = torch.cuda.memory_allocated()
        found = lctrain.generate(model, PROMPTS, max_new_tokens=12, **options)
    assert 1 in joined
    assert torch.cuda.memory_allocated() <= allocated
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    rows = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, found, strict=True)]
    plain, exact = both_references(model, rows, [len(prompt) for prompt in PROMPTS])
    actual = [torch.tensor(one.log_probs) for one in found]
    assert_error_at_most_twice(
        torch.cat(actual), torch.cat(plain), torch.cat(exact), "log-probabilities"
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["beams", "samples"],
)
def test_a_paged_cache(make, device, reorderings, attention, options):
    model, patch = make(attention), {"attention": attention, **ATTENTIONS[attention]}
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[1] * (width - len(row)) + row for row in PROMPTS], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    with lctrain.patch_model(model, **patch), torch.no_grad():
        cache = lctrain.PagedCache(model, pages=64)
        torch.manual_seed(0)
        found = model.generate(
            ids,
            attention_mask=mask.to(device),
            max_new_tokens=12,
            pad_token_id=1,
            past_key_values=cache,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        beams = getattr(found, "beam_indices", None)
        scores = model.compute_transition_scores(
            found.sequences, found.logits, beams, normalize_logits=True
        )
    assert bool(reorderings) == ("num_beams" in options)
    assert all(same and small for same, small in reorderings)
    copies = len(found.sequences) // len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(copies)]
    rows = [
        [*prompt, *tokens[width:].tolist()]
        for prompt, tokens in zip(prompts, found.sequences, strict=True)
    ]
    plain, exact = both_references(model, rows, [len(prompt) for prompt in prompts], **patch)
    assert_error_at_most_twice(
        scores.float().cpu().flatten(), torch.cat(plain), torch.cat(exact), "log-probabilities"
    )
