"""Tests the commands that the documents print: all options exist, and the README's commands run."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import transformers

from lctrain import evaluate, train
from lctrain.composition import compose
from lctrain.config import TrainConfig, to_dataclass
from lctrain.evaluate import EvalConfig
from tests.docs.test_pages import AS_A_FILE, PAGES
from tests.evaluate.conftest import save_model
from tests.house.typecheck import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:lctrain-train|lctrain-eval) [^`]+)`")
SCHEMAS = {"lctrain-train": ("train", TrainConfig), "lctrain-eval": ("eval", EvalConfig)}

# Appended to a printed command of the README, so that it takes seconds on a CPU.
SMALL = {
    "lctrain-train": (
        "model=tiny data.max_documents=12 data.max_tokens=512 data.vocab_size=300 "
        "data.num_workers=0 data.held_out_fraction=0.2 trainer.accelerator=cpu "
        "trainer.max_steps=2 trainer.limit_val_batches=1 trainer.enable_progress_bar=false "
        "evaluation.lengths=[16,64] evaluation.documents=2 evaluation.document_tokens=100"
    ),
    "lctrain-eval": "lengths=[32,64,128] passkey.lengths=[256] passkey.keys_per_cell=1 "
    "passkey.depths=[0.5] document_tokens=200 device=cpu",
}


def printed_commands(text: str) -> list[str]:
    """Returns a page's lctrain commands, each on one line and without its comment."""
    lines = []
    for block in (block for language, block in FENCE.findall(text) if not language):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith(tuple(SCHEMAS)):
                lines.append(shlex.join(shlex.split(line, comments=True)))
            elif match := re.match(r'make train ARGS="(.*)"', line):
                lines.append(f"lctrain-train {match[1]}")
    lines += [match for match in INLINE.findall(text) if "--" not in match and "..." not in match]
    return lines


# Pages that add options of their own are left out; test_how_to.py runs their commands.
COMMON = [page for page in PAGES if page.name not in AS_A_FILE]
COMMANDS = sorted({line for page in COMMON for line in printed_commands(page.read_text())})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with the files that the printed commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LCTRAIN_CACHE", str(tmp_path / "cache"))
    for number in range(12):
        text = f"Book {number}. " + f"Sentence {number} of a book. " * (20 + number)
        (tmp_path / "books").mkdir(exist_ok=True)
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    for name in ("recipes", "lctrain"):  # of a clone
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_documents_print_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_has_options_that_exist(command, folder):
    program, *overrides = shlex.split(command)
    name, schema = SCHEMAS[program]
    overrides = [re.sub(r"^model=(?=.*/)", "model.name_or_path=", item) for item in overrides]
    settings = [f"paths.output_dir={folder / 'out'}", *overrides]
    if program == "lctrain-eval" and not any("model" in item for item in overrides):
        settings.append("model.name_or_path=path")
    to_dataclass(compose(name, settings), schema)


def run(command: str, monkeypatch, *more: str) -> None:
    program, *overrides = shlex.split(command)
    main = train.main if program == "lctrain-train" else evaluate.main
    monkeypatch.setattr(sys, "argv", [program, *overrides, *more])
    main()


def printed(capfd) -> str:
    """Returns what was printed since the last call."""
    return "".join(capfd.readouterr())


def run_small(command: str, monkeypatch, *more: str) -> None:
    run(command, monkeypatch, *shlex.split(SMALL[command.split()[0]]), *more)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_commands_of_the_readme_run(folder, monkeypatch):
    """Runs the README's commands in order, after starting the run that the README resumes."""
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    save_model(folder / "path" / "or" / "name", config)
    commands = printed_commands((ROOT / "README.md").read_text())
    assert {command.split()[0] for command in commands} == {"lctrain-train", "lctrain-eval"}
    for command in commands:
        if "ckpt_path=last" in command:
            run_small(command.replace("ckpt_path=last", ""), monkeypatch, "trainer.max_steps=1")
        run_small(command, monkeypatch)
    assert list(folder.rglob("metrics.csv"))
    assert list(folder.rglob("passkey_retrieval.csv"))


@pytest.mark.filterwarnings("ignore")
def test_the_trial_of_the_guide_of_chats_runs_and_so_does_the_command_that_it_ends_with(
    folder, monkeypatch, capfd
):
    pytest.importorskip("peft")
    guide = (ROOT / "docs" / "guides" / "chat.md").read_text()
    (command,) = (line for line in printed_commands(guide) if "shipped_model" in line)
    assert "adapter=lora" in command
    small = "trainer.accelerator=cpu trainer.enable_progress_bar=false data.num_workers=0"
    run(command, monkeypatch, *small.split(), "trainer.max_steps=2")
    pattern = r"^next +\S*lctrain-eval (.*)$"  # with its folder, if it is not in PATH
    (then,) = re.findall(pattern, printed(capfd), re.MULTILINE)
    run(f"lctrain-eval {then}", monkeypatch, "device=cpu", "lengths=[16,32]")
    assert "Perplexity by context length of model" in printed(capfd)
