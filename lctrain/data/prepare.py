"""Preparation: turns the documents of a source into packed rows, before training."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lctrain.config import DataSettings
from lctrain.data.chat.source import ChatSource
from lctrain.data.chat.store import ChatStore
from lctrain.data.chat.template import ChatTemplate
from lctrain.data.chat.tokenizing import ChatTokenizing
from lctrain.data.collator import PackedRows
from lctrain.data.documents import Documents, TokenStore, count_shared, read_documents
from lctrain.data.faults import on_first_rank, shared_message, warn_first_rank
from lctrain.data.hub import HubSource
from lctrain.data.mix import overlong_of, placed
from lctrain.data.packing import Overlong, PackingPlan, document_limit, plan_rows
from lctrain.data.passkey import PasskeyFormat
from lctrain.data.passkey_rows import (
    SHORTEST,
    JoinedStore,
    PasskeyStore,
    add_passkeys,
    passkey_lengths,
)
from lctrain.data.prepared import OWN_SET, PreparedData, fingerprint_settings
from lctrain.data.sources import Source
from lctrain.data.streaming import HeldOut, StreamRecipe
from lctrain.data.tokenizer import (
    DamagedTokenizerError,
    fingerprint_tokenizer,
    load_tokenizer,
    train_mask_tokenizer,
    train_tokenizer,
)
from lctrain.data.tokenizing import tokenize
from lctrain.limits import check_passkey_source, check_stream
from lctrain.local_paths import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Prepares packed rows of the documents of a source.

    Attributes:
        source: Source of the documents.
        tokenizer: A tokenizer of transformers, or its name or path. None trains a tokenizer on the
            training documents.
        settings: Settings of the data module.
        held_out_sets: Sources of further held-out sets, by name.
    """

    source: Source
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None
    settings: DataSettings
    held_out_sets: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_stream(self.source, self.settings.passkey_fraction)
        check_passkey_source(self.source, self.settings.passkey_fraction)
        if isinstance(self.source, ChatSource) and self.tokenizer is None:
            raise ValueError(
                "tokenizer must be given for conversations, got None. Set data.tokenizer to the "
                "tokenizer of an instruct model, which has a chat template."
            )

    @cached_property
    def cache_dir(self) -> Path:
        """Cache folder, which holds the documents, their tokens and the trained tokenizer."""
        return cache_folder(self.settings.cache_dir)

    def run(self) -> PreparedData:
        """Reads, splits, tokenizes and packs the documents; uses cached results where they exist.

        Raises:
            ValueError: if the data cannot be read, holds no text, or fills no row, or a file of the
                cache is damaged.
            OSError: if the cache cannot be written; the message names the folder.
        """
        with cache_errors(self.cache_dir):
            return self._run()

    def _run(self) -> PreparedData:
        tokenizer = self.given_tokenizer()
        train, held_out = self.documents()
        if tokenizer is None:
            masks = self.settings.mask_fraction is not None
            make = train_mask_tokenizer if masks else train_tokenizer
            tokenizer = make(train, self.settings.vocab_size, self.cache_dir)
        written_date = self.check_tokenizer(tokenizer)
        train_rows = self.pack(train, tokenizer, self.settings.passkey_fraction)
        if len(train_rows) == 0:
            raise ValueError(
                f"data must fill at least one row, got none: {train_rows.plan.report}. Use more "
                "data, a larger max_tokens, or overlong=split."
            )
        settings = {
            "source": repr(self.source),
            "training_documents": train.fingerprint,
            "held_out_fraction": self.settings.held_out_fraction,
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "max_tokens": self.settings.max_tokens,
            "overlong": self.settings.overlong,
            "packing_window": self.settings.packing_window,
        }
        # Defaults are left out, so that checkpoints without these settings can be resumed.
        if self.settings.max_document_tokens is not None:
            settings["max_document_tokens"] = self.settings.max_document_tokens
        if self.settings.special_tokens != "text":
            settings["special_tokens"] = self.settings.special_tokens
        if self.settings.mask_fraction is not None:
            settings["mask_fraction"] = self.settings.mask_fraction
        if self.settings.passkey_fraction:
            settings["passkey_fraction"] = self.settings.passkey_fraction
        if isinstance(self.source, ChatSource):
            settings["chat"] = self.chat(tokenizer).fingerprint
            if written_date is not None:
                settings["chat_date"] = written_date
        if getattr(self.source, "endless", False):
            settings["window_bytes"] = self.source.window_bytes  # type: ignore[attr-defined]
        stream = self._stream(tokenizer, held_out, settings)
        own = {OWN_SET: self.pack(held_out, tokenizer, held_out=True)}
        sets = own | prepare_sets(self.held_out_sets, tokenizer, self.settings, [train])
        return PreparedData(tokenizer, train_rows, sets, settings, stream)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """Warns about what the tokenizer does not teach the model.

        Returns:
            The date that the chat template writes into conversations; None if it writes none.

        Raises:
            ValueError: if conversations have no chat template.
        """
        if not isinstance(self.source, ChatSource):
            if tokenizer.eos_token_id is None:
                warn_first_rank(
                    "The tokenizer has no end token: documents end without one, and the model does "
                    "not learn to stop. To change that, set tokenizer.eos_token, save the "
                    "tokenizer, and name that folder as data.tokenizer."
                )
            return None
        template = ChatTemplate(tokenizer, self.source.rendering)
        if not template.ends_turns:
            warn_first_rank(
                "The chat template ends an assistant turn without a special token: the model "
                "does not learn to stop. Name another template as data.chat_template."
            )
        if template.written_date is not None:
            warn_first_rank(
                "The chat template writes today's date into conversations: on another day "
                "their tokens differ, and this run cannot be resumed. " + template.date_remedy
            )
        return template.written_date

    def _stream(
        self, tokenizer: PreTrainedTokenizerBase, held_out: Documents, settings: dict[str, Any]
    ) -> StreamRecipe | None:
        """Returns what determines the rows of an endless stream; None for other sources."""
        source = self.source
        if not (isinstance(source, HubSource) and source.endless):
            return None
        fraction = 0.0 if source.held_out_split else self.settings.held_out_fraction
        digests = held_out.digests.tolist() if fraction else []
        return StreamRecipe(
            source=source,
            held_out=HeldOut(fraction, frozenset(digests)),
            tokenizer=tokenizer,
            settings=self.settings,
            journal=self.cache_dir / "streams" / f"{fingerprint_settings(settings)}.json",
        )

    def given_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Returns the tokenizer that the user named or passed; None if it is to be trained.

        If the source names a chat template, the tokenizer has this template, so that it is saved
        with the trained model. A tokenizer that the user passed is not changed.
        """
        given = self.tokenizer
        if given is None:
            return None
        if isinstance(given, (str, os.PathLike)):
            tokenizer = load_tokenizer(os.fspath(given))
        else:
            tokenizer = given
        if isinstance(self.source, ChatSource) and self.source.rendering.template is not None:
            tokenizer = copy.copy(tokenizer)
            tokenizer.chat_template = self.source.rendering.template
        return tokenizer

    def documents(self) -> tuple[Documents, Documents]:
        """Returns the documents to train on, and those to hold out.

        Raises:
            ValueError: if a document cannot be read and the source does not allow that, or no
                document has text.
        """
        label = type(self.source).__name__
        train = read_documents(self.source.load(self.cache_dir), label)
        set_aside = self.source.load_held_out(self.cache_dir)
        if set_aside is None:
            train, held_out = self.split(train)
        else:
            held_out = read_documents(set_aside, f"{label}.held_out")
            warn_of_shared(held_out, [train])
        if len(train) == 0:
            raise ValueError(
                f"data must hold at least one document with text, got none from {self.source} "
                f"({train.dropped_empty} empty). Check the files and the field."
            )
        return train, held_out

    def read_all(self) -> Documents:
        """Returns all documents of the source; none is held out.

        Raises:
            ValueError: if no document has text.
        """
        found = read_documents(self.source.load(self.cache_dir), type(self.source).__name__)
        if len(found) == 0:
            raise ValueError(
                f"a held-out set must hold at least one document with text, got none from "
                f"{self.source}. Check the files and the field."
            )
        return found

    def split(self, documents: Documents) -> tuple[Documents, Documents]:
        """Returns the documents to train on, and those to hold out. A conversation is not cut."""
        cut = not isinstance(self.source, ChatSource)
        return documents.split(self.settings.held_out_fraction, cut)

    def pack(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        passkey_fraction: float = 0.0,
        held_out: bool = False,
    ) -> PackedRows:
        """Tokenizes documents and packs them into rows.

        Args:
            documents: Texts, or conversations as JSON text.
            tokenizer: A transformers tokenizer.
            passkey_fraction: Fraction of the tokens of a row that belong to passkey documents.
            held_out: Whether it is only a warning if no conversation can be used.
        """
        store: Any = self.tokenize(documents, tokenizer, may_be_empty=held_out)
        passkey_tokens = round(self.settings.max_tokens * passkey_fraction)
        plan = plan_rows(
            store.lengths,
            self.settings.max_tokens - passkey_tokens,
            max_document_tokens=self.settings.max_document_tokens,
            overlong=cast(Overlong, self.settings.overlong),
            window=self.settings.packing_window,
            dropped_empty=documents.dropped_empty,
            dropped_unreadable=documents.dropped_unreadable + len(getattr(store, "faults", ())),
            progress=on_first_rank(),
            count_trained=getattr(store, "count_trained", None),
        )
        report = replace(
            plan.report, repaired=documents.repaired, special_texts=store.special_texts
        )
        plan = replace(plan, report=report)
        if passkey_fraction == 0 or len(plan) == 0:
            return PackedRows(store, plan)
        return self._add_passkeys(store, plan, PasskeyFormat.of(tokenizer), passkey_tokens)

    def tokenize(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        may_be_empty: bool = False,
    ) -> TokenStore | ChatStore:
        """Returns the tokens of documents of the source, from the cache if they are there.

        Args:
            documents: Texts, or conversations as JSON text.
            tokenizer: A transformers tokenizer.
            may_be_empty: Whether it is only a warning if no conversation can be used.
        """
        settings = self.settings
        if isinstance(self.source, ChatSource):
            chat = self.chat(tokenizer)
            return chat.run(documents, self.cache_dir, settings.num_proc, may_be_empty)
        return tokenize(
            documents, tokenizer, self.cache_dir, settings.num_proc, settings.special_tokens
        )

    def chat(self, tokenizer: PreTrainedTokenizerBase) -> ChatTokenizing:
        """Returns the object that tokenizes the conversations of a ChatSource."""
        assert isinstance(self.source, ChatSource)
        return ChatTokenizing(
            tokenizer=tokenizer,
            rendering=self.source.rendering,
            keep_special=self.settings.special_tokens == "token",
            on_error=self.source.on_error,
        )

    def _add_passkeys(
        self, store: TokenStore, plan: PackingPlan, format: PasskeyFormat, tokens: int
    ) -> PackedRows:
        shortest = max(SHORTEST, format.shortest)
        longest = min(
            tokens, document_limit(self.settings.max_document_tokens, self.settings.max_tokens)
        )
        if longest < shortest:
            raise ValueError(
                f"passkey_fraction and max_document_tokens must leave room for documents of "
                f"{shortest} tokens, the shortest with a passkey, got {longest}. Raise them, or "
                "set passkey_fraction=0."
            )
        lengths, row_offsets = passkey_lengths(len(plan), tokens, shortest, longest)
        mixed = add_passkeys(plan, len(store), lengths, row_offsets, self.settings.max_tokens)
        return PackedRows(JoinedStore(store, PasskeyStore(format, lengths, store)), mixed)


def set_readers(
    sets: Mapping[str, Source],
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None,
    settings: DataSettings,
) -> dict[str, Preparation]:
    """Returns the Preparation of each held-out set that has a source of its own, by name.

    Args:
        sets: Sources of the sets by name.
        tokenizer: A tokenizer of transformers, or its name or path; None for a trained one.
        settings: Settings of the data module.
    """
    readers = {}
    for name, source in sets.items():
        overlong = overlong_of(source, None, settings.overlong)
        own = replace(settings, overlong=overlong, passkey_fraction=0.0)
        with placed(f"held_out_sets.{name}"):
            readers[name] = Preparation(source=source, tokenizer=tokenizer, settings=own)
    return readers


def prepare_sets(
    sets: Mapping[str, Source],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    train: Sequence[Documents],
) -> dict[str, PackedRows]:
    """Returns the rows of held-out sets that have sources of their own.

    Args:
        sets: Sources of the sets by name.
        tokenizer: A transformers tokenizer.
        settings: Settings of the data module.
        train: The training documents, of every source.
    """
    found = {}
    for name, reader in set_readers(sets, tokenizer, settings).items():
        with placed(f"held_out_sets.{name}"):
            documents = reader.read_all()
            warn_of_shared(documents, train, f"The held-out set {name}: ")
            found[name] = reader.pack(documents, tokenizer, held_out=True)
    return found


def warn_of_shared(held_out: Documents, train: Sequence[Documents], place: str = "") -> None:
    """Warns if held-out documents are also in the training data.

    Args:
        held_out: The held-out documents.
        train: The training documents, of every source.
        place: Text before the message.
    """
    shared = sum(count_shared(held_out, documents) for documents in train)
    if shared:
        warn_first_rank(shared_message(shared, len(held_out), place))


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Context manager that adds the cache folder to errors of `datasets` and pyarrow.

    Args:
        folder: The cache folder.

    Raises:
        ValueError: if a file of the cache is damaged.
        OSError: if a file cannot be written; its `filename` is the folder if it had none.
    """
    try:
        yield
    except Exception as error:
        if _is_damage(error):
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(
                f"data.cache_dir must hold intact files, got {folder} with a damaged one "
                f"({type(error).__name__}: {reason}). Delete the folder; the next run fills it. "
                "An error of your own Source must be mended there."
            ) from error
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(folder)
        raise


def _is_damage(error: Exception) -> bool:
    """Whether pyarrow, json or the tokenizers library could not read what a file holds."""
    if isinstance(error, OSError):
        return error.errno is None and "IPC" in str(error)  # pyarrow's
    return (
        isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
        or type(error).__name__ in ("ArrowInvalid", "ArrowSerializationError")
        or isinstance(error, DamagedTokenizerError)
    )
