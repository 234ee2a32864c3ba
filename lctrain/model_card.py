"""Writes the model card of an exported model: its facts, and how to load it."""

from __future__ import annotations

from typing import Any

from lctrain.attention import AttentionSpec, DualChunkSpec
from lctrain.model_names import public_name

_LOAD = """```python
{imports}
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_LOAD_ADAPTERS = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_LOAD_ON_BASE = """```python
from peft import PeftModel
from transformers import AutoTokenizer
model = PeftModel.from_pretrained(base, "path/to/this/folder")  # base: the model as it was before
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
_PLAIN = "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
_FAMILY = "import lctrain  # registers the family\n" + _PLAIN


def model_card(
    model: Any,
    spec: AttentionSpec | None,
    trained_length: int | None,
    version: int | None,
    adapters: bool = False,
) -> str:
    """Returns the text of the model card, for README.md.

    Args:
        model: Trained language model of transformers, causal or masked.
        spec: Attention used in training; None for that of transformers.
        trained_length: Length of the longest document in training, in tokens; None if unknown.
        version: Version of the model's differential attention; None if it has none.
        adapters: Whether the folder holds only PEFT adapters, without the model's own weights.
    """
    config = model.config
    given = getattr(config, "_name_or_path", "")
    base = public_name(given)
    library = "peft" if adapters else "transformers"
    masked = type(model).__name__.endswith("ForMaskedLM")
    tag = "fill-mask" if masked else "text-generation"
    header = [f"library_name: {library}", f"pipeline_tag: {tag}", "tags: [lctrain]"]
    if "/" in base:
        header.append(f"base_model: {base}")
    facts = [
        f"family: `{config.model_type}`, {type(model).__name__}",
        f"parameters: {sum(p.numel() for p in model.parameters()):,}"
        + (f", {_trained(model):,} of them trained" if adapters else ""),
        f"attention in training: {'that of transformers' if spec is None else spec.kind}",
    ]
    if base:
        facts.append(f"trained from: `{base}`")
    if trained_length is not None:
        facts.append(f"longest document in training: {trained_length:,} tokens")
    load = _LOAD.format(imports=(_FAMILY if version == 2 else _PLAIN).strip())
    if masked:
        load = load.replace("AutoModelForCausalLM", "AutoModelForMaskedLM")
    if adapters:
        load = _LOAD_ADAPTERS if given else _LOAD_ON_BASE
        if masked:
            load = load.replace("AutoPeftModelForCausalLM", "AutoPeftModel")
    what = _what_loads(config, spec, trained_length, version)
    if adapters:
        what = [
            _what_adapters_are(base, bool(given)),
            *(what if isinstance(spec, DualChunkSpec) else []),
        ]
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        f"# A {'masked' if masked else 'causal'} language model trained with lctrain",
        "\n".join(f"- {fact}" for fact in facts),
        "## Loading it",
        load,
        "\n\n".join(what),
    ]
    return "\n\n".join(parts) + "\n"


def _trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _what_adapters_are(base: str, is_named: bool) -> str:
    """Returns a paragraph that says which model the adapters need.

    Args:
        base: Name of the base model on the hub; empty if it has none.
        is_named: Whether the adapters' configuration names the base model, by a name or a folder.
    """
    needed = f"`{base}`" if base else "the base model, which this folder does not name or hold"
    if is_named and not base:
        needed = "the base model, whose folder `adapter_config.json` names"
    return (
        f"The folder holds adapters of PEFT, not a whole model: loading them needs PEFT and "
        f"{needed}. `model.merge_and_unload()` adds them to its weights and returns an ordinary "
        "model."
    )


def _what_loads(
    config: Any, spec: AttentionSpec | None, trained_length: int | None, version: int | None
) -> list[str]:
    """Returns paragraphs about loading the model in transformers and other programs."""
    if version == 2:
        return [
            f"`{config.model_type}` is a family of lctrain (differential attention, version 2). "
            "Without `import lctrain`, transformers does not know it, and neither do other "
            "programs.",
        ]
    if version == 1:
        return [
            "Differential attention, version 1, is transformers' DiffLlama: plain transformers "
            "loads it. Programs without that family do not.",
        ]
    if isinstance(spec, DualChunkSpec):
        scaled = f', scale="{spec.scale}", scale_coefficient={spec.scale_coefficient}'
        options = scaled if spec.scale != "none" else ""
        return [
            f"The model reads beyond its window of {spec.window:,} tokens by dual chunk attention "
            "only. Plain transformers loads the weights and ignores the attention: its outputs are "
            f"the same for texts of up to {min(spec.chunk_size or 0, spec.window or 0):,} tokens "
            "and worse beyond. For longer texts, patch it:",
            f'```python\nimport lctrain\n\nlctrain.patch_model(model, "dual_chunk"{options})\n```',
            "The sizes are in `dual_chunk_attention_config` of `config.json`, in the form of "
            "Qwen2.5-1M. A program that reads this key for the model's family, as vLLM does for "
            "some, can compute the same; one that does not is limited to the window.",
        ]
    beyond = (
        f" Beyond {trained_length:,} tokens it has not been trained."
        if trained_length is not None and not getattr(config, "_name_or_path", "")
        else ""
    )
    return [
        f"These are the files of an ordinary `{config.model_type}` model: plain transformers loads "
        f"them without lctrain, and so does any program that supports this family.{beyond}",
        "`lctrain.patch_model(model)` computes the same on packed documents, without padding.",
    ]
