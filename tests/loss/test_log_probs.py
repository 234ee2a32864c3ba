"""Tests log-probabilities of packs and the losses on them against float64 formulas on documents."""

import copy
import dataclasses
import math

import pytest
import torch

import lctrain
from lctrain import PackedBatch
from lctrain.callbacks import TokenExactLoss
from lctrain.loss import causal_lm_loss, token_losses
from lctrain.loss.log_probs import TokenLogProbs, token_log_probs
from lctrain.loss.policy import group_advantages, policy_loss
from lctrain.loss.preference import preference_loss
from tests.numerics import assert_equal_in_float64, assert_far_apart, near
from tests.training import loader, make_trainer

PAIRS = [
    ([5, 6, 7, 8, 9, 10], [[20, 21, 22], [30, 31]]),
    ([12, 13], [[50, 51], [60, 61, 62, 63]]),
]
pytestmark = pytest.mark.usefixtures("in_float64")


def documents_of(groups):
    return [(prompt, completion) for prompt, found in groups for completion in found]


def plain_log_probs(model, groups, temperature=1.0):
    """Returns the log-probabilities of every completion's tokens, each document on its own."""
    found = []
    for prompt, completion in documents_of(groups):
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0] / temperature
        log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(log_probs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.fixture
def models(make_llama):
    """A patched model, and the same model without a patch."""
    patched = make_llama().double()
    lctrain.patch_model(patched)
    return patched, make_llama().double()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_are_those_of_the_documents(models, temperature):
    patched, plain = models
    batch = PackedBatch.from_groups(PAIRS)
    found = token_log_probs(patched, batch, temperature=temperature, entropy=True)
    expected = plain_log_probs(plain, PAIRS, temperature)
    assert_equal_in_float64(found.log_probs, torch.cat(expected))
    assert found.completion.tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert_equal_in_float64(found.sums(), torch.stack([x.sum() for x in expected]))
    assert found.counts().tolist() == [3, 2, 2, 4]
    logits = patched(**batch.model_kwargs()).logits[0][batch.labels[0] != -100] / temperature
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert_equal_in_float64(found.entropy, entropy.detach())
    assert not found.entropy.requires_grad


def test_log_probs_of_a_pack_without_groups(models):
    patched, plain = models
    pairs = documents_of(PAIRS)
    batch = PackedBatch.from_documents(
        [[*prompt, *completion] for prompt, completion in pairs],
        labels=[[-100] * len(prompt) + completion for prompt, completion in pairs],
    )
    found = token_log_probs(patched, batch)
    assert_equal_in_float64(found.log_probs, torch.cat(plain_log_probs(plain, PAIRS)))
    assert found.counts().tolist() == [3, 2, 2, 4]


def test_a_head_that_must_compute_its_logits_gives_the_same(models, monkeypatch):
    patched, _ = models
    batch = PackedBatch.from_groups(PAIRS)
    fused = token_log_probs(patched, batch, temperature=0.5, entropy=True)
    monkeypatch.setattr("lctrain.loss.log_probs.find_output_head", lambda *a: None)
    whole = token_log_probs(patched, batch, temperature=0.5, entropy=True)
    assert_equal_in_float64(fused.log_probs, whole.log_probs)
    assert_equal_in_float64(fused.entropy, whole.entropy)


def test_a_model_without_its_adapters_is_the_reference(models):
    peft = pytest.importorskip("peft")
    patched, plain = models
    batch = PackedBatch.from_groups(PAIRS)
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    adapted = peft.get_peft_model(patched, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        with adapted.disable_adapter():
            reference = token_log_probs(adapted, batch).sums()
    expected = torch.stack([x.sum() for x in plain_log_probs(plain, PAIRS)])
    assert_equal_in_float64(reference, expected)
    found = preference_loss(token_log_probs(adapted, batch), reference)
    found.loss.backward()
    assert_far_apart(token_log_probs(adapted, batch).sums(), reference)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


def oracle(kind, chosen, rejected, chosen_ref, rejected_ref, beta, gamma, smoothing):
    """The loss of one pair, from its papers' formulas."""
    if kind in ("dpo", "ipo"):
        ratios = (chosen - chosen_ref, rejected - rejected_ref)
        if kind == "ipo":
            return (ratios[0].mean() - ratios[1].mean() - 1 / (2 * beta)) ** 2
        margin = beta * (ratios[0].sum() - ratios[1].sum())
        wrong = torch.log1p(torch.exp(margin))  # -log sigmoid(-m)
        return (1 - smoothing) * torch.log1p(torch.exp(-margin)) + smoothing * wrong
    if kind == "simpo":
        margin = beta * (chosen.mean() - rejected.mean()) - gamma
        return torch.log1p(torch.exp(-margin))
    odds = [p.mean().exp() / (1 - p.mean().exp()) for p in (chosen, rejected)]
    ratio = torch.log(odds[0] / odds[1])
    return -chosen.mean() + beta * torch.log1p(torch.exp(-ratio))


@pytest.mark.parametrize(
    ("kind", "gamma", "smoothing"),
    [
        ("dpo", 0.0, 0.0),
        ("dpo", 0.0, 0.1),
        ("ipo", 0.0, 0.0),
        ("simpo", 0.5, 0.0),
        ("orpo", 0.0, 0.0),
    ],
)
def test_preference_losses_and_gradients(models, make_llama, kind, gamma, smoothing):
    patched, plain = models
    other = make_llama(seed=1).double()
    reference = [x.detach() for x in plain_log_probs(other, PAIRS)]
    lctrain.patch_model(other)
    batch = PackedBatch.from_groups(PAIRS)
    with torch.no_grad():
        sums = token_log_probs(other, batch).sums() if kind in ("dpo", "ipo") else None
    found = preference_loss(
        token_log_probs(patched, batch), sums, kind=kind, beta=0.3, gamma=gamma,
        label_smoothing=smoothing,
    )  # fmt: skip
    own = plain_log_probs(plain, PAIRS)
    losses = [
        oracle(kind, own[i], own[i + 1], reference[i], reference[i + 1], 0.3, gamma, smoothing)
        for i in (0, 2)
    ]
    assert found.pairs == 2
    assert_equal_in_float64(found.loss, sum(losses))
    assert_equal_in_float64(gradients(patched, found.loss), gradients(plain, sum(losses)))
    assert found.margins.shape == (2,)
    assert not found.margins.requires_grad


def test_orpo_is_finite_where_a_completion_is_certain_or_impossible():
    for value in (-1e-30, -800.0):
        log_probs = torch.tensor([value, -1.0], requires_grad=True)
        found = preference_loss(
            TokenLogProbs(log_probs, torch.tensor([0, 1]), 2), kind="orpo", beta=0.1
        )
        found.loss.backward()
        assert found.loss.isfinite()
        assert log_probs.grad.isfinite().all()


def grpo_oracle(new, old, ref, advantages, low, high, kl, by_sequence, average):
    total = 0.0
    for p, q, r, advantage in zip(new, old, ref, advantages, strict=True):
        ratio = torch.exp((p - q).mean()).expand(len(p)) if by_sequence else torch.exp(p - q)
        first, second = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
        loss = -torch.where(first < second, first, second)
        loss = loss + kl * (torch.exp(r - p) - (r - p) - 1)
        total = total + (loss.mean() if average == "completion" else loss.sum())
    return total


@pytest.mark.parametrize("average", ["token", "completion"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_policy_loss_and_gradients(models, make_llama, average, ratio):
    patched, plain = models
    old, ref = (
        [x.detach() for x in plain_log_probs(make_llama(seed=seed).double(), PAIRS)]
        for seed in (1, 2)
    )
    advantages = group_advantages(torch.tensor([1.0, 0.0, 0.25, 0.75]), 2)
    options = {"clip_low": 0.05, "clip_high": 0.1, "kl": 0.2, "average": average, "ratio": ratio}
    batch = PackedBatch.from_groups(PAIRS)
    found = policy_loss(
        token_log_probs(patched, batch), torch.cat(old), advantages, reference=torch.cat(ref),
        **options,
    )  # fmt: skip
    expected = grpo_oracle(
        plain_log_probs(plain, PAIRS), old, ref, advantages, 0.05, 0.1, 0.2, ratio == "sequence",
        average,
    )  # fmt: skip
    assert found.divisor == (4 if average == "completion" else 11)
    assert 0 < found.clipped < 11
    assert_equal_in_float64(found.loss, expected)
    assert_equal_in_float64(gradients(patched, found.loss), gradients(plain, expected))
    parts = []
    for number, (prompt, completions) in enumerate(PAIRS):
        for index, completion in enumerate(completions):
            alone = PackedBatch.from_groups([(prompt, [completion])])
            place = 2 * number + index
            parts.append(policy_loss(
                token_log_probs(patched, alone), old[place], advantages[place : place + 1],
                reference=ref[place], **options,
            ))  # fmt: skip
    assert_equal_in_float64(sum(part.loss for part in parts), found.loss)
    assert sum(part.divisor for part in parts) == found.divisor
    assert_equal_in_float64(sum(part.kl for part in parts), found.kl)


@pytest.mark.parametrize("average", ["token", "completion"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_token_of_weight_0_is_as_if_it_were_not_there(average, ratio):
    """Its log-probability may be infinite; completion 1 has no other token."""
    completion = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    kept = torch.tensor([0, 2, 5, 6])
    logs = -torch.rand(7) - 0.1
    old, reference = logs - 0.5, -torch.rand(7) - 0.1  # the ratio of every token is clipped
    logs[1] = float("-inf")
    weights = torch.zeros(7).index_fill(0, kept, 2.0)
    options = {"clip_low": 0.01, "kl": 0.2, "average": average, "ratio": ratio}
    whole = logs.clone().requires_grad_()
    found = policy_loss(
        TokenLogProbs(whole, completion, 3), old, torch.tensor([1.0, 5.0, -1.0]),
        reference=reference, token_weights=weights, **options,
    )  # fmt: skip
    part = logs[kept].requires_grad_()
    expected = policy_loss(
        TokenLogProbs(part, torch.tensor([0, 0, 1, 1]), 2), old[kept], torch.tensor([1.0, -1.0]),
        reference=reference[kept], token_weights=weights[kept], **options,
    )  # fmt: skip
    assert found.divisor == (2 if average == "completion" else 4)
    assert found.clipped == expected.clipped > 0
    assert_equal_in_float64([found.loss, found.kl], [expected.loss, expected.kl])
    found.loss.backward()
    expected.loss.backward()
    assert_equal_in_float64(whole.grad[kept], part.grad)
    assert not whole.grad[[1, 3, 4]].any()


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo", "orpo"])
def test_completions_without_a_trained_token_count_nowhere(kind):
    """Completions 2 to 4 of six have no token: pair 0 is the only complete one."""
    logs = torch.tensor([-0.5, -0.2, -0.7, -0.4], requires_grad=True)
    policy = TokenLogProbs(logs, torch.tensor([0, 0, 1, 5]), 6)
    alone = TokenLogProbs(logs[:3], torch.tensor([0, 0, 1]), 2)
    sums = torch.zeros(6) if kind in ("dpo", "ipo") else None
    found = preference_loss(policy, sums, kind=kind)
    expected = preference_loss(alone, None if sums is None else sums[:2], kind=kind)
    assert found.pairs == 1
    assert_equal_in_float64(found.loss, expected.loss)
    assert found.margins.tolist() == [expected.margins.item(), 0.0, 0.0]
    found.loss.backward()
    assert logs.grad.isfinite().all()
    assert logs.grad[3] == 0
    counted = policy_loss(policy, logs.detach(), torch.ones(6), average="completion")
    assert counted.divisor == 3


def test_a_pack_without_targets_has_no_loss_and_no_divisor(models):
    found = token_log_probs(models[0], PackedBatch.from_groups(PAIRS).without_targets())
    assert preference_loss(found, kind="simpo")[:2] == (0, 0)
    for average in ("token", "completion"):
        assert policy_loss(found, found.log_probs, torch.ones(4), average=average)[:2] == (0, 0)


def test_a_model_that_ignores_groups_is_an_error(models):
    """Without its patch, a model would show the prompt to the first completion only."""
    patched, plain = models
    batch = PackedBatch.from_groups(PAIRS)
    unpatched = copy.deepcopy(plain)
    lctrain.patch_model(unpatched).unpatch()
    positions, targets = torch.arange(2), torch.arange(2)
    for model in (plain, unpatched):
        for call in (
            lambda model=model: token_log_probs(model, batch),
            lambda model=model: causal_lm_loss(model, batch),
            lambda model=model: token_losses(model, batch.model_kwargs(), positions, targets),
        ):
            with pytest.raises(ValueError, match="shared prefixes must be flash, got sdpa"):
                call()
    plain.set_attn_implementation("lctrain_flash")  # by name
    assert_equal_in_float64(causal_lm_loss(plain, batch)[0], causal_lm_loss(patched, batch)[0])


def test_a_share_of_a_pack_is_an_error(models):
    batch = dataclasses.replace(PackedBatch.from_groups(PAIRS), share=object())
    with pytest.raises(ValueError, match=r"batch must be a whole pack, .* got a share of one"):
        token_log_probs(models[0], batch)


def test_advantages_are_relative_to_the_group():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0, 5.0])
    found = group_advantages(rewards, [(0, 1), (2, 3, 4)])
    assert found.tolist() == near(
        [-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4), 0.0, 0.0, 0.0]
    )
    assert torch.equal(group_advantages(rewards, [2, 3]), found)
    assert group_advantages(rewards[:2], 2, scale=False).tolist() == [-1.0, 1.0]
    assert group_advantages(torch.tensor([1, 3]), 2, scale=False).tolist() == [-1.0, 1.0]
    assert group_advantages(torch.tensor([True, False]), 2, scale=False).tolist() == [0.5, -0.5]
    with pytest.raises(ValueError, match="members must give every group at least one"):
        group_advantages(rewards, [5, 0])
    with pytest.raises(ValueError, match="members must divide the 5 rewards into groups, got 2"):
        group_advantages(rewards, 2)
    with pytest.raises(ValueError, match="rewards must be one for each of 2 completions, got 5"):
        group_advantages(rewards, [(0, 1)])
    with pytest.raises(ValueError, match=r"rewards must be of shape \[C\], .* got \[1, 5\]"):
        group_advantages(rewards[None], 5)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="rewards must be finite, got nan or inf"):
            group_advantages(torch.tensor([1.0, wrong]), 2)


def pair_module(model):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        """Trains on pairs with simpo, and keeps the gradients of a step."""

        def __init__(self):
            super().__init__()
            self.model = model
            self.seen = []

        def training_step(self, batch, batch_idx):
            found = preference_loss(token_log_probs(self.model, batch), kind="simpo", beta=2.0)
            return {"loss": found.loss, "num_tokens": found.pairs}

        def on_before_optimizer_step(self, optimizer):
            self.seen.append([p.grad.clone() for p in self.model.parameters()])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    return Module()


def test_accumulated_packs_of_pairs_give_the_gradient_of_one_pack(models, tmp_path):
    patched, _ = models
    more = [*PAIRS, ([7, 8, 9], [[1, 2], [3]])]
    batches = [PackedBatch.from_groups(part) for part in (more[:2], more[2:])]
    accumulated, whole = pair_module(patched), pair_module(patched)
    settings = {"callbacks": [TokenExactLoss()], "max_steps": 1}
    make_trainer(tmp_path, accumulate_grad_batches=2, **settings).fit(accumulated, loader(batches))
    make_trainer(tmp_path, callbacks=[TokenExactLoss()], max_steps=1).fit(
        whole, loader([PackedBatch.from_groups(more)])
    )
    assert_equal_in_float64(accumulated.seen, whole.seen)


def test_faulty_arguments(models):
    patched, _ = models
    batch = PackedBatch.from_groups(PAIRS)
    found = token_log_probs(patched, batch)
    old, advantages = found.log_probs.detach(), torch.ones(4)
    cases = [
        (lambda: token_log_probs(patched, batch, temperature=0.0), "temperature must be above 0"),
        (lambda: preference_loss(found, kind="kto"), "kind must be one of dpo, ipo, simpo, orpo"),
        (lambda: preference_loss(found), "reference must be given for dpo, got None"),
        (lambda: preference_loss(found, advantages, kind="simpo"), "reference must be None for"),
        (lambda: preference_loss(found, advantages[:2]), r"reference must be of shape \[4\]"),
        (lambda: preference_loss(found, advantages, beta=0.0), "beta must be above 0 and fin"),
        (lambda: preference_loss(found, advantages, gamma=1.0), "gamma must be 0 for dpo"),
        (lambda: preference_loss(found, advantages, label_smoothing=0.5), r"must be in \[0, 0.5\)"),
        (
            lambda: preference_loss(TokenLogProbs(old[:3], torch.arange(3), 3), kind="simpo"),
            "policy must hold pairs of completions, got 3 completions",
        ),
        (lambda: policy_loss(found, old[:2], advantages), r"old_log_probs must be of shape \[11\]"),
        (lambda: policy_loss(found, old, advantages[:3]), r"advantages must be of shape \[4\]"),
        (lambda: policy_loss(found, old, advantages, average="x"), "average must be one of token"),
        (lambda: policy_loss(found, old, advantages, ratio="x"), "ratio must be one of token, seq"),
        (lambda: policy_loss(found, old, advantages, clip_low=0.0), "clip_low must be in"),
        (lambda: policy_loss(found, old, advantages, kl=0.1), "kl must be at least 0 and finite"),
    ]
    for wrong in (math.nan, math.inf):
        cases += [
            (lambda x=wrong: token_log_probs(patched, batch, temperature=x), "temperature must"),
            (lambda x=wrong: preference_loss(found, advantages, beta=x), "beta must be above 0"),
            (lambda x=wrong: preference_loss(found, kind="simpo", gamma=x), "gamma must be finite"),
            (
                lambda x=wrong: policy_loss(found, old, advantages, reference=old, kl=x),
                "kl must be at least 0 and finite",
            ),
        ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
