"""MixPreparation: prepares the rows of a mix of sources, and a held-out set for every source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lctrain.config import DataSettings
from lctrain.data.documents import Documents, join_documents
from lctrain.data.faults import on_first_rank
from lctrain.data.mix import SourceMix, overlong_of, placed
from lctrain.data.mixed_rows import MixedPart, mix_rows
from lctrain.data.prepare import Preparation, cache_errors, prepare_sets, warn_of_shared
from lctrain.data.prepared import PreparedData
from lctrain.data.sources import Source
from lctrain.data.tokenizer import fingerprint_tokenizer, train_mask_tokenizer, train_tokenizer
from lctrain.limits import check_passkey_source, require
from lctrain.local_paths import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class MixPreparation:
    """Prepares packed rows of the documents of several sources.

    Attributes:
        source: The mix.
        tokenizer: A tokenizer of transformers, or its name or path. None trains a tokenizer on the
            training documents of all sources.
        settings: Settings of the data module.
        held_out_sets: Sources of further held-out sets, by name.
    """

    source: SourceMix
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None
    settings: DataSettings
    held_out_sets: Mapping[str, Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_passkey_source(self.source, self.settings.passkey_fraction)
        shared = sorted({str(part.name) for part in self.source.parts} & set(self.held_out_sets))
        require(
            not shared,
            f"held_out_sets must have other names than the sources, got {', '.join(shared)}. Each "
            "source has a held-out set of its own.",
        )
        _ = self.parts  # raises for conversations without a tokenizer

    @cached_property
    def cache_dir(self) -> Path:
        """Cache folder, which holds the documents, their tokens and the trained tokenizer."""
        return cache_folder(self.settings.cache_dir)

    @cached_property
    def parts(self) -> dict[str, Preparation]:
        """Preparation of each source, by the name of the source."""
        found = {}
        for number, part in enumerate(self.source.parts):
            overlong = overlong_of(part.source, part.overlong, self.settings.overlong)
            with placed(f"sources[{number}]"):
                found[str(part.name)] = Preparation(
                    source=part.source,
                    tokenizer=self.tokenizer,
                    settings=replace(self.settings, overlong=overlong),
                )
        return found

    def run(self) -> PreparedData:
        """Reads, splits, tokenizes and packs the documents; uses cached results where they exist.

        Raises:
            ValueError: if a source cannot be read or holds no text, no row is filled, or a file of
                the cache is damaged; a message about one source begins with its name.
            OSError: if the cache cannot be written; the message names the folder.
        """
        with cache_errors(self.cache_dir):
            return self._run()

    def _run(self) -> PreparedData:
        read: dict[str, tuple[Documents, Documents]] = {}
        for name, preparation in self.parts.items():
            with placed(name):
                read[name] = preparation.documents()
        train = {name: documents for name, (documents, _) in read.items()}
        for name, (_, held_out_of_source) in read.items():  # its own documents are compared above
            others = [documents for other, documents in train.items() if other != name]
            place = f"The held-out set {name}, in other sources: "
            warn_of_shared(held_out_of_source, others, place)
        tokenizer = self.given_tokenizer()
        if tokenizer is None:
            joined = join_documents(list(train.values()))
            masks = self.settings.mask_fraction is not None
            make = train_mask_tokenizer if masks else train_tokenizer
            tokenizer = make(joined, self.settings.vocab_size, self.cache_dir)
        parts, dates = [], []
        for part in self.source.parts:
            name = str(part.name)
            preparation = self.parts[name]
            with placed(name):
                dates.append(preparation.check_tokenizer(tokenizer))
                store = preparation.tokenize(train[name], tokenizer)
            overlong = preparation.settings.overlong
            parts.append(MixedPart(name, store, overlong, part.epochs, part.weight))
        rows = mix_rows(
            parts,
            max_tokens=self.settings.max_tokens,
            max_document_tokens=self.settings.max_document_tokens,
            window=self.settings.packing_window,
            seed=self.settings.seed,
            progress=on_first_rank(),
        )
        rows.plan = replace(rows.plan, report=_with_unread(rows.report, train.values(), parts))
        held_out = {}
        for name, preparation in self.parts.items():
            with placed(name):
                held_out[name] = preparation.pack(read[name][1], tokenizer, held_out=True)
        held_out |= prepare_sets(self.held_out_sets, tokenizer, self.settings, list(train.values()))
        settings = self._settings(train, tokenizer)
        if any(dates):
            settings["chat_date"] = next(filter(None, dates))
        return PreparedData(tokenizer, rows, held_out, settings)

    def given_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Returns the tokenizer that the user named or passed; None if it is to be trained.

        If a source names a chat template, the tokenizer has this template.
        """
        chats = [name for name, made in self.parts.items() if hasattr(made.source, "train_on")]
        templated = [n for n in chats if self.parts[n].source.rendering.template]  # type: ignore[attr-defined]
        return self.parts[[*templated, *self.parts][0]].given_tokenizer()

    def _settings(
        self, train: Mapping[str, Documents], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Any]:
        """Returns the plain values that determine the rows."""
        sources = []
        for part in self.source.parts:
            preparation = self.parts[str(part.name)]
            found = {
                "texts": train[str(part.name)].fingerprint,
                "weight": part.weight,
                "epochs": float(part.epochs),
                "overlong": preparation.settings.overlong,
            }
            if part.is_chat:
                found["chat"] = preparation.chat(tokenizer).fingerprint
            sources.append(found)
        texts = " ".join(str(found["texts"]) for found in sources)
        return {
            "source": repr(self.source),
            "training_documents": hashlib.sha256(texts.encode()).hexdigest()[:16],
            "sources": sources,
            "mix_seed": self.settings.seed,
            "held_out_fraction": self.settings.held_out_fraction,
            "tokenizer": fingerprint_tokenizer(tokenizer),
            "max_tokens": self.settings.max_tokens,
            "max_document_tokens": self.settings.max_document_tokens,
            "packing_window": self.settings.packing_window,
            "special_tokens": self.settings.special_tokens,
            "mask_fraction": self.settings.mask_fraction,
        }


def _with_unread(report: Any, train: Any, parts: list[MixedPart]) -> Any:
    """Returns the report with the numbers of documents left out or repaired while reading."""
    faults = sum(len(getattr(part.store, "faults", ())) for part in parts)
    return replace(
        report,
        dropped_empty=sum(documents.dropped_empty for documents in train),
        dropped_unreadable=sum(documents.dropped_unreadable for documents in train) + faults,
        repaired=sum(documents.repaired for documents in train),
    )
