"""Tests lctrain-push: what it prints without a network, what it sends, and its errors."""

import json

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from lctrain.push import main


@pytest.fixture
def model(tmp_path):
    """A folder as lctrain-train exports it, with files that must stay here."""
    folder = tmp_path / "model"
    (folder / ".cache").mkdir(parents=True)
    for name, size in {
        "config.json": 10, "model.safetensors": 2000, "README.md": 5, "tokenizer_config.json": 3,
        "last.ckpt": 50, ".cache/x": 1, ".token": 1,
    }.items():  # fmt: skip
        (folder / name).write_bytes(b"x" * size)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The calls that reach the hub; `hub.error` is raised by the upload."""
    calls = []

    class Hub:
        error = None

        def create_repo(self, name, **options):
            calls.append(("create_repo", name, options))

        def create_branch(self, name, **options):
            calls.append(("create_branch", name, options))

        def upload_folder(self, **options):
            if Hub.error is not None:
                raise Hub.error
            calls.append(("upload_folder", options.pop("repo_id"), options))
            return "https://hub/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = calls
    return Hub


def test_without_upload_it_prints_and_sends_nothing(model, hub, capsys):
    assert main([str(model), "owner/name", "--private"]) == 0
    printed = capsys.readouterr().out
    assert "Model repository owner/name, branch main; created as private if" in printed
    assert "2,000 bytes  model.safetensors" in printed
    assert "2,018 bytes in 4 files" in printed
    assert "ckpt" not in printed
    assert "warning" not in printed
    assert "Nothing was uploaded. Add --upload to do it." in printed
    assert not hub.calls


@pytest.mark.parametrize(
    ("base", "warned"), [("/models/small", True), ("owner/base", False), (None, False)]
)
def test_adapters_of_a_local_base_model_are_a_warning(model, hub, capsys, base, warned):
    (model / "config.json").unlink()
    text = json.dumps({"base_model_name_or_path": base})
    (model / "adapter_config.json").write_text(text)
    assert main([str(model), "owner/name"]) == 0
    printed = capsys.readouterr().out
    assert ("the adapters need the model in /models/small, a folder that" in printed) is warned
    assert ("train with adapter.merge=true" in printed) is warned


def test_a_path_of_this_machine_in_a_file_is_a_warning(model, hub, capsys):
    (model / "README.md").write_text(f"trained from `{model}`, see https://hub/usr/bin and and/or")
    (model / "extra.json").write_text(json.dumps({"data": str(model.parent), "no": "/a/missing"}))
    (model / "vocab.txt").write_text(f"{model} " * 2**20)
    assert main([str(model), "owner/name"]) == 0
    warnings = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning")]
    assert warnings == [
        f"warning: {name} names {place}, a place on this machine. Remove it from the file, or "
        "write a public name."
        for name, place in (("README.md", model), ("extra.json", model.parent))
    ]


def test_a_relative_folder_of_the_base_model_is_a_warning(model, hub, capsys, monkeypatch):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "runs/base"}')
    (model.parent / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(model.parent)
    assert main([str(model), "owner/name"]) == 0
    assert "warning: the adapters need the model in runs/base" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_adapter_config_is_an_error(model, hub, capsys, text):
    (model / "adapter_config.json").write_text(text)
    assert main([str(model), "owner/name"]) == 2
    printed = capsys.readouterr().err
    assert "adapter_config.json must be JSON with base_model_name_or_path, got" in printed
    assert "Export the adapters again." in printed


def test_with_upload_it_sends_the_printed_files(model, hub, capsys):
    (model / "README.md").unlink()
    assert main([str(model), "owner/name", "--branch", "trial", "--upload"]) == 0
    printed = capsys.readouterr().out
    assert "warning: no model card (README.md)" in printed
    assert printed.endswith("Uploaded: https://hub/owner/name\n")
    names = [name for name, _, _ in hub.calls]
    assert names == ["create_repo", "create_branch", "upload_folder"]
    sent = hub.calls[-1][2]
    assert sent["revision"] == "trial"
    assert sent["allow_patterns"] == ["config.json", "model.safetensors", "tokenizer_config.json"]


def test_a_hub_that_cannot_be_reached_is_an_expected_error(model, hub, capsys):
    for error in (ConnectionError("no route"), LocalTokenNotFoundError("no token")):
        hub.error = error
        assert main([str(model), "owner/name", "--upload"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("lctrain-push: the hub must accept the upload to owner/name, got")
        assert f"{type(error).__name__}: {error}. Log in with `hf auth login`" in printed
    hub.error = TypeError("a bug")
    with pytest.raises(TypeError):
        main([str(model), "owner/name", "--upload"])


@pytest.mark.parametrize(
    ("folder", "name", "message"),
    [
        ("none", "owner/name", "which is not a folder. lctrain-train writes one"),
        (".", "owner/name", "without configuration (config.json or adapter_config.json)"),
        ("model", "name", "the repository must be named owner/name, got 'name'. Name your account"),
        ("model", "a b/c", "the repository must be named owner/name, got 'a b/c': "),
    ],
)
def test_faulty_arguments(model, folder, name, message, capsys):
    assert main([str(model.parent / folder), name]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_weights(model, capsys):
    (model / "model.safetensors").unlink()
    assert main([str(model), "owner/name"]) == 2
    assert "without weights (*.safetensors or *.bin)" in capsys.readouterr().err
