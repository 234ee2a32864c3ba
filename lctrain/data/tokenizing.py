"""Tokenizing: documents to token ids, in parallel, each document ending with the end token."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.data.documents import TokenStore
from lctrain.data.tokenizer import fingerprint_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lctrain.data.documents import Documents

_RECIPE = "end-token-once-1"  # raise when tokenizing changes, so that old caches are not used
_TEXTS_AT_A_TIME = 64


def tokenize(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: Path,
    num_proc: int | None = None,
) -> TokenStore:
    """Tokenizes documents, or finds their tokens in the cache.

    Special tokens that the tokenizer adds by itself (a begin token) are kept; the end token is
    appended unless it did that already.

    Args:
        documents: What to tokenize.
        tokenizer: With an end token.
        cache_dir: Tokens are kept under cache_dir/tokens, keyed by the texts and the tokenizer.
        num_proc: Processes. None: this one, in which a fast tokenizer uses all cores anyway.
    """
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32"))})
    if len(documents) == 0:
        return TokenStore(Dataset.from_dict({"input_ids": []}, features=features), [])
    parts = (_RECIPE, documents.fingerprint, fingerprint_tokenizer(tokenizer))
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
    folder = cache_dir / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = documents.texts.map(
        _tokenize,
        batched=True,
        batch_size=_TEXTS_AT_A_TIME,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=documents.texts.column_names,
        features=features,
        num_proc=num_proc if num_proc is not None and num_proc > 1 else None,
        cache_file_name=str(folder / f"{key}.arrow"),
        new_fingerprint=key,
        desc="Tokenizing",
    )
    return TokenStore(dataset, documents.names)


def _tokenize(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[Any]]:
    encoded = tokenizer(
        batch["text"],
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # documents are longer than the model's length; they are split later
    )
    end = tokenizer.eos_token_id
    return {
        "input_ids": [
            ids if ids and ids[-1] == end else [*ids, end] for ids in encoded["input_ids"]
        ]
    }
