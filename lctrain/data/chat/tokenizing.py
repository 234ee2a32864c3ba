"""ChatTokenizing: tokenizes conversations, and marks the tokens to train on."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lctrain.data.chat.literal import LiteralEncoder
from lctrain.data.chat.source import Rendering
from lctrain.data.chat.store import ChatStore
from lctrain.data.chat.template import ChatTemplate, ConversationError, Rendered, template_of
from lctrain.data.documents import Documents
from lctrain.data.token_cache import map_groups
from lctrain.data.tokenizer import fingerprint_tokenizer, name_unencodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RENDERED = 128  # conversations that are rendered while those before them are tokenized
_NONE = np.array([], dtype=np.int32)
_RECIPE = "chat-6"  # raise when tokenizing changes, so that old caches are not used


@dataclass(frozen=True, kw_only=True)
class ChatTokenizing:
    """Tokenizes conversations by the chat template of a tokenizer.

    Attributes:
        tokenizer: A transformers tokenizer with offsets ("fast").
        rendering: Template, its variables, and the turns to train on.
        keep_special: Whether the text of a special token inside a message becomes that token.
        on_error: "skip" leaves out conversations that cannot be used; "raise" stops at the first.

    Raises:
        ValueError: if the tokenizer has no offsets.
    """

    tokenizer: PreTrainedTokenizerBase
    rendering: Rendering
    keep_special: bool = False
    on_error: str = "skip"

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise ValueError(
                "data.tokenizer must be a fast tokenizer for conversations, got "
                f"{type(self.tokenizer).__name__}, which does not tell the characters of a token. "
                "Use one with a tokenizer.json."
            )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines tokens and labels."""
        parts = (
            _RECIPE,
            fingerprint_tokenizer(self.tokenizer),
            template_of(self.tokenizer, self.rendering),
            template_of(self.tokenizer, self.rendering, tools=True),
            sorted(map(str, self.tokenizer.special_tokens_map.items())),
            self.rendering.fingerprint,
            self.keep_special,
            ChatTemplate(self.tokenizer, self.rendering).written_date,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def run(
        self,
        documents: Documents,
        cache_dir: Path,
        num_proc: int | None = None,
        may_be_empty: bool = False,
    ) -> ChatStore:
        """Tokenizes conversations, or loads their tokens from the cache.

        Args:
            documents: Conversations as JSON text.
            cache_dir: Cache folder. Tokens are kept in cache_dir/tokens.
            num_proc: Number of processes. None tokenizes in this process, where a fast tokenizer
                uses all cores.
            may_be_empty: Whether the method only warns if no conversation can be used.

        Raises:
            ValueError: if no conversation can be used; with on_error="raise", if one cannot.
        """
        rows = map_groups(
            documents,
            self._tokenize_group,
            _features(),
            cache_dir,
            parts=(self.fingerprint,),
            num_proc=num_proc,
            description="Tokenizing conversations",
        )
        store = ChatStore(rows, documents.names, self.on_error)
        store.report(self.on_error, may_be_empty)
        return store

    def _tokenize_group(self, batch: dict[str, list[int]], documents: Documents) -> dict[str, Any]:
        group = range(batch["first"][0], batch["stop"][0])
        rows = self.tokenize(documents.read(group))
        if self.on_error == "raise":
            for number, row in zip(group, rows, strict=True):
                if row["fault"] is not None:
                    raise ValueError(f"{documents.names[number]}: {row['fault']}")
        columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
        return columns | {"document": list(group)}

    def tokenize(self, texts: list[str]) -> list[dict[str, Any]]:
        """Tokenizes conversations, and returns one row per conversation.

        Args:
            texts: Conversations as JSON text.

        Returns:
            Rows with the token ids, the ranges of tokens to train on, and the fault: None, or why
            the conversation cannot be used.
        """
        template = ChatTemplate(self.tokenizer, self.rendering, self.keep_special)
        rendered: list[Rendered | str] = []
        pending = []
        with ThreadPoolExecutor(1) as pool:  # a tokenizer releases Python's lock while it encodes
            for start in range(0, len(texts), _RENDERED):
                part = [_rendered(template, text) for text in texts[start : start + _RENDERED]]
                plain = [x.text for x in part if isinstance(x, Rendered) and not x.cuts]
                pending.append(pool.submit(self._encode, plain))
                rendered += part
        encoded = chain.from_iterable(future.result() for future in pending)
        rows = []
        for found in rendered:
            if isinstance(found, str):
                rows.append(_row(fault=found))
                continue
            try:
                ids, ends = self._encode_cut(found) if found.cuts else next(encoded)
            except ConversationError as error:
                rows.append(_row(fault=str(error)))
                continue
            spans = _token_spans(ends, found.spans)
            if not any(end > max(begin, 1) for begin, end in spans):
                fault = "a conversation must have a token to train on, got none. Leave it out."
                rows.append(_row(fault=fault))
                continue
            flat = np.array(spans, dtype=np.int32).reshape(-1)
            lost = ", ".join(found.lost) or None
            rows.append(_row(ids, flat, special_texts=len(found.cuts), lost=lost))
        return rows

    def _encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns token ids [n] and (begin, end) characters [n, 2] of the tokens of each text."""
        if not texts:
            return []
        with name_unencodable(self.tokenizer):
            found = self.tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # longer than the model's length
            )
        return [
            (
                np.array(ids, np.int32),
                np.fromiter(chain.from_iterable(places), np.int64).reshape(-1, 2),
            )
            for ids, places in zip(found["input_ids"], found["offset_mapping"], strict=True)
        ]

    @cached_property
    def _literal(self) -> LiteralEncoder:
        return LiteralEncoder(self.tokenizer)

    def _encode_cut(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a text whose special tokens are ordinary text where they have a cut.

        Raises:
            ConversationError: if the tokenizer cannot read them as ordinary text.
        """
        text, cuts = rendered.text, rendered.cuts
        with name_unencodable(self.tokenizer):
            found = self._literal.encode(text, cuts)
        if found is not None:
            return found
        bounds = [0, *cuts, len(text)]
        parts = self._encode([text[a:b] for a, b in pairwise(bounds)])
        ids = np.concatenate([ids for ids, _ in parts])
        ((whole, _),) = self._encode([text])
        if self._decode(ids) != self._decode(whole):
            raise ConversationError(
                "a message must be without the text of a special token, since the tokenizer cannot "
                f"read it as ordinary text; got {text[cuts[0] - 1 :][:20]!r}. Remove it, or use "
                "data.special_tokens=token."
            )
        places = [place + start for (_, place), start in zip(parts, bounds, strict=False)]
        return ids, np.concatenate(places)

    def _decode(self, ids: np.ndarray) -> Any:
        return self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def _rendered(template: ChatTemplate, text: str) -> Rendered | str:
    """Returns a conversation as text, or why the template refuses it."""
    try:
        return template.render(text)
    except ConversationError as error:
        return str(error)


def _row(
    ids: np.ndarray = _NONE,
    spans: np.ndarray = _NONE,
    special_texts: int = 0,
    fault: str | None = None,
    lost: str | None = None,
) -> dict[str, Any]:
    texts = {"fault": fault, "lost": lost}
    return {"input_ids": ids, "spans": spans, "special_texts": special_texts, **texts}


def _features() -> Any:
    """Returns the columns of a dataset of tokenized conversations, with their types."""
    from datasets import Features, List, Value

    return Features(
        {
            "input_ids": List(Value("int32")),
            "spans": List(Value("int32")),
            "document": Value("int64"),
            "special_texts": Value("int64"),
            "fault": Value("string"),
            "lost": Value("string"),
        }
    )


def _token_spans(places: np.ndarray, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the ranges of tokens that hold a character of a span, as pairs (begin, end).

    A token covers the characters from the end of the token before it: tokenizers do not count white
    space as a token's characters. If a character is several tokens, such as its bytes, each of them
    covers the character.

    Args:
        places: [n, 2] int64, begin and end (exclusive) of each token's characters.
        spans: Characters, as pairs (begin, end) in rising order.
    """
    ends = np.maximum.accumulate(places[:, 1]) if len(places) else places[:, 1]
    before = np.concatenate([[0], ends[:-1]])
    begins = np.where(ends > before, before, np.minimum(places[:, 0], ends - 1))
    found = []
    for begin, end in spans:
        # Begins and ends rise with the token, so the tokens of a span are consecutive.
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(begins, end, side="left"))
        if last > first:
            found.append((first, last))
    return found
