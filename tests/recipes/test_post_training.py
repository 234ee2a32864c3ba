"""Tests the recipe of SFT, DPO and GRPO: its parts, its records, and all stages in a tiny form."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import lctrain
from lctrain.build import build_model
from lctrain.data.passkey import PasskeyFormat
from lctrain.eval.shipped import load_passkey_model
from lctrain.loss import policy_loss
from lctrain.recipes.post_training import conversations, grpo, runs, table
from lctrain.recipes.post_training.__main__ import main
from lctrain.recipes.post_training.dpo import make_pairs
from lctrain.recipes.post_training.experiment import Experiment, read_texts
from lctrain.recipes.post_training.grpo import by_half, first_seed
from lctrain.recipes.post_training.passkeys import QuestionSets, accuracy, rewards
from lctrain.recipes.post_training.scale import SCALES
from lctrain.train import train
from tests.numerics import as_float32

LONG = 200  # tokens, more than the beginnings that files share


@pytest.fixture
def shipped():
    found = load_passkey_model("shipped")
    return found.model, PasskeyFormat.of(found.tokenizer)


@pytest.fixture
def questions(shipped):
    texts = [np.arange(3, 700) % 1000 + 1]
    return QuestionSets(shipped[1], texts, SCALES["tiny"], seed=0, steps=4)


def test_the_shipped_conversations_are_those_that_the_code_writes():
    lines = conversations.FILE.read_text().splitlines()
    assert [json.loads(line) for line in lines] == conversations.conversations()
    for conversation in conversations.conversations(20, seed=3):
        given, first, again, second = [turn["content"] for turn in conversation["messages"]]
        assert first in given
        assert second in given
        assert again.split()[-1] == f"{second.split()[0]}?"


@pytest.mark.filterwarnings("ignore")
def test_all_stages_run(tmp_path, monkeypatch):
    """A tiny form of what the README's command runs; the weights must move."""
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    trained = []

    def remembered(*arguments):
        model = build_model(*arguments)
        weights = {n: w.detach().clone() for n, w in model.named_parameters() if w.requires_grad}
        trained.append((model, weights))
        return model

    def different(found, answers):
        """Rewards that differ within a group whatever was drawn, or no weight would move."""
        return rewards(found, answers) + torch.arange(len(found)) % 2

    monkeypatch.setattr(runs, "build_model", remembered)
    monkeypatch.setattr(grpo, "rewards", different)
    main(["--scale", "tiny", "--seeds", "0", "--output", str(tmp_path / "out")])
    assert len(trained) == 2
    for model, weights in trained:
        now = dict(model.named_parameters())
        assert any(not torch.equal(now[name].cpu(), weight) for name, weight in weights.items())
    records = {
        stage: json.loads((tmp_path / "out" / f"{stage}.json").read_text())
        for stage in ("sft", "dpo", "grpo")
    }
    assert records["sft"]["steps"] == 2
    assert records["sft"]["held_out_loss"][1] < records["sft"]["held_out_loss"][0]
    for stage in ("dpo", "grpo"):
        (run,) = records[stage]["runs"]
        assert run["steps"] == 2
        assert all(0 <= share <= 1 for share in run["accuracy"])


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_an_earlier_record_is_kept(tmp_path, stage):
    (tmp_path / f"{stage}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"stage {stage} has not run, got .*holds {stage}.json"):
        main(["--stages", stage, "--output", str(tmp_path)])
    assert (tmp_path / f"{stage}.json").read_text() == "{}"


def test_a_stopped_stage_goes_on_with_the_seeds_that_are_missing(tmp_path, monkeypatch, capsys):
    """The seed during which the stage stopped begins again, in a new folder."""
    command = ["--stages", "grpo", "--seeds", "0", "1", "--output", str(tmp_path)]
    steps = ["--", "trainer.max_steps=1"]
    stopped_run = tmp_path / "grpo_1" / "metrics.csv"

    def train_seed(experiment, stage, seed, *arguments):
        if seed == 1 and not stopped_run.exists():
            stopped_run.parent.mkdir()
            stopped_run.write_text("of a stopped run")
            raise KeyboardInterrupt
        return {"seed": seed, "accuracy": [0.4, 0.6], "seconds": 1.0}

    monkeypatch.setattr(runs, "_train_seed", train_seed)
    with pytest.raises(KeyboardInterrupt):
        main([*command, *steps])
    with pytest.raises(ValueError, match=r"the same settings, got .* overrides=\['trainer.max"):
        main(command)
    assert [run["seed"] for run in json.loads((tmp_path / "grpo.json").read_text())["runs"]] == [0]

    def train_in_new_folder(experiment, stage, seed, *arguments):
        assert seed == 1
        assert not stopped_run.exists()
        return {"seed": seed, "accuracy": [0.4, 0.7], "seconds": 2.0}

    monkeypatch.setattr(runs, "_train_seed", train_in_new_folder)
    monkeypatch.setattr("time.strftime", lambda form: "2030-01-01")  # on another day
    main([*command, *steps])
    assert "seed 0: is in grpo.json already" in capsys.readouterr().out
    found = json.loads((tmp_path / "grpo.json").read_text())["runs"]
    assert [run["seconds"] for run in found] == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"grpo has not run, got .*grpo.json with these seeds"):
        main([*command, *steps])


@pytest.mark.filterwarnings("ignore")
def test_a_signal_stops_a_stage_without_a_record(tmp_path, monkeypatch, capfd):
    """Lightning alone ends a process that gets SIGTERM with the status 0."""
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    training_step = grpo.Grpo.training_step

    def signalled(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGTERM)
        return training_step(self, batch, batch_idx)

    monkeypatch.setattr(grpo.Grpo, "training_step", signalled)
    command = ["--scale", "tiny", "--stages", "grpo", "--seeds", "0", "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM." in capfd.readouterr().err
    assert not (tmp_path / "grpo.json").exists()


def test_questions_are_those_of_their_seed_and_step(questions, shipped):
    one, again = questions[1], questions[1]
    assert torch.equal(one.prompts, again.prompts)
    assert not torch.equal(one.prompts, questions[2].prompts)
    assert one.prompts.shape == (4, SCALES["tiny"].length - 4)
    for prompt, answer in zip(one.prompts.tolist(), one.answers.tolist(), strict=True):
        assert any(prompt[n : n + 4] == answer for n in range(len(prompt)))


def test_a_reward_is_the_share_of_words_before_the_first_error():
    answers = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    given = [[1, 2, 3, 4], [1, 9, 3, 4], [9, 6, 7, 8], [5, 6]]
    found = rewards([torch.tensor(row) for row in given], answers)
    assert found.tolist() == [1.0, 0.25, 0.0, 0.5]


def test_no_two_steps_have_a_seed_in_common():
    seeds = [first_seed(run, step, 64) + n for run in (0, 1) for step in range(3) for n in (0, 63)]
    assert len(set(seeds)) == len(seeds)


def test_grpo_takes_the_log_probs_of_its_rollouts_as_the_old_ones(shipped, questions, monkeypatch):
    """They are the policy's own within rounding, so no token is clipped."""
    model, _ = shipped
    config = Experiment(Path(), SCALES["tiny"], (0,)).compose("grpo", 0)
    module = grpo.Grpo(model, config, SCALES["tiny"])
    lctrain.patch_model(model)
    seen, rollouts = [], []

    def remembered(policy, old, *arguments, **options):
        seen.append((policy, old))
        return policy_loss(policy, old, *arguments, clip_low=1e-3, **options)

    def generated(*arguments, **options):
        rollouts.append(lctrain.generate(*arguments, **options))
        return rollouts[-1]

    monkeypatch.setattr(grpo, "policy_loss", remembered)
    monkeypatch.setattr(grpo, "generate", generated)
    assert torch.isfinite(module.training_step(questions[0], 0))
    ((policy, old),) = seen
    assert old.tolist() == [as_float32(x) for c in rollouts[0] for x in c.log_probs]
    loss = policy_loss(policy, old, torch.ones(policy.completions), clip_low=1e-3)
    assert int(loss.clipped) == 0
    assert len(rollouts[0]) == 4 * SCALES["tiny"].samples


def test_pairs_hold_the_right_key_and_another_answer(shipped, questions):
    model, _ = shipped
    lctrain.patch_model(model)
    torch.manual_seed(0)
    keys = [row for step in range(4) for row in questions[step].answers.tolist()]
    for pack in make_pairs(questions, model):
        assert pack.groups is not None
        for chosen, rejected in pack.groups.members:
            ends = pack.cu_seqlens.tolist()
            one, other = (pack.input_ids[0, ends[n] : ends[n + 1]] for n in (chosen, rejected))
            assert one[0] == other[0]  # the last token of the prompt
            assert one[1:].tolist() in keys
            assert not torch.equal(one, other)


def test_grpo_trains_adapters(tmp_path, questions, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(grpo, "rewards", lambda given, answers: torch.arange(len(given)).float())
    config = Experiment(tmp_path, SCALES["tiny"], (0,), ("adapter=lora",)).compose("grpo", 0)
    policy = build_model(config.model, 0, config.adapter)
    module = grpo.Grpo(policy, config, SCALES["tiny"])
    lctrain.patch_model(policy.get_base_model())
    module.training_step(questions[0], 0).backward()
    for name, weight in policy.named_parameters():
        assert weight.requires_grad == ("lora" in name)
        assert (weight.grad is not None) == weight.requires_grad
    assert any(weight.grad.any() for weight in policy.parameters() if weight.grad is not None)


def test_grpo_takes_its_reference_from_the_memory_settings(tmp_path, shipped):
    experiment = Experiment(tmp_path, SCALES["tiny"], (0,), ("memory.reference=host",))
    module = grpo.Grpo(shipped[0], experiment.compose("grpo", 0), SCALES["tiny"])
    assert module.reference._on_host
    with pytest.raises(ValueError, match=r"memory\.reference must be null for lctrain-train"):
        train(experiment.compose("sft", 0))


def test_the_measured_texts_and_keys_are_no_training_ones(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    model, format = shipped
    scale = dataclasses.replace(SCALES["tiny"], keys_per_depth=20, depths=(0.5,))
    experiment = Experiment(tmp_path, scale, (0,), ("data.max_bytes=600000",))
    _, texts, held_out = read_texts(experiment.compose("grpo", 0))
    training = np.concatenate(texts)
    found = [text[:LONG] for text in held_out if len(text) >= LONG]
    assert found
    for text in found:
        starts = np.flatnonzero(training == text[0])
        assert not [n for n in starts if np.array_equal(training[n : n + LONG], text)]

    asked = []
    make = PasskeyFormat.make

    def remembered(self, random, tokens, *arguments, **options):
        made = make(self, random, tokens, *arguments, **options)
        asked.append((tokens, made.key))
        return made

    lctrain.patch_model(model)
    monkeypatch.setattr(PasskeyFormat, "make", remembered)
    accuracy(model, format, held_out, scale)
    measured = {one for one in asked if one[0] == scale.length}
    assert len(measured) == 20
    asked.clear()
    questions = QuestionSets(format, texts, scale, seed=0, steps=400)
    for step in range(len(questions)):
        questions[step]
    assert len(asked) == 400 * scale.prompts
    assert not measured & set(asked)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention=dual_chunk", "attention must be flash"),
        ("attention=none", "attention must be flash"),
        ("trainer.devices=2", "trainer.devices and trainer.num_nodes must be 1"),
        ("trainer.strategy=fsdp2", "trainer.strategy must be auto or single_device"),
        ("trainer.max_steps=0", "trainer.max_steps must be at least 1"),
        ("trainer.budget_s=5", "trainer.budget_s must be null"),
        ("ckpt_path=last", "ckpt_path must be null"),
        ("evaluation.enabled=true", "evaluation.enabled must be false"),
        ("show=2", "show must be 0"),
    ],
)
def test_settings_that_dpo_and_grpo_ignore_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        Experiment(tmp_path, SCALES["tiny"], (0,), (override,)).compose("grpo", 0)


def test_overrides_are_refused_before_the_first_stage_trains(tmp_path):
    with pytest.raises(ValueError, match="ckpt_path must be null with DPO and GRPO"):
        main(["--output", str(tmp_path / "out"), "--", "ckpt_path=last"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rewards", "halves"), [([0.5], [0.5, 0.5]), ([0, 1, 0.5], [0.5, 0.75])])
def test_a_run_of_any_length_has_two_halves(rewards, halves):
    assert by_half(rewards) == halves


def test_the_readme_has_the_tables_of_its_records():
    text = table.README.read_text()
    assert table.tables() in text
    assert "python -m lctrain.recipes.post_training" in text


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_training_raised_the_share_of_keys_by_20_points_from_every_seed(stage):
    """The bar of the recipe, on the records that the README prints."""
    records = table.records(stage)
    assert max(len({run["seed"] for run in record["runs"]}) for record in records) >= 3
    for record in records:
        for run in record["runs"]:
            before, after = run["accuracy"]
            assert 0.2 <= before <= 0.5
            assert after - before >= 0.2
            assert record["device"] == "CPU" or run["seconds"] <= 600
