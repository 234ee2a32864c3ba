"""ChatSource: conversations from files, or from a dataset of the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lctrain.data.chat.readers import chat_column, read_chat
from lctrain.data.faults import report_faults
from lctrain.data.hub import load_split
from lctrain.data.limits import head
from lctrain.data.readers import File
from lctrain.data.sources import FileSource, generate
from lctrain.data.streams import check_encoding
from lctrain.limits import require

if TYPE_CHECKING:
    from datasets import Dataset

TRAIN_ON = ("assistant", "last_assistant", "completion", "all")


@dataclass(frozen=True)
class Rendering:
    """Settings that decide, beside the tokenizer, how a conversation becomes tokens and labels.

    Attributes:
        train_on: Turns to train on, one of TRAIN_ON.
        template: Text of a chat template; None takes the tokenizer's own.
        arguments: Further variables of the template.
    """

    train_on: str
    template: str | None
    arguments: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of the settings."""
        parts = [self.train_on, self.template, sorted(self.arguments.items())]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class ChatSource(FileSource):
    """Source of conversations, which the tokenizer's chat template turns into text.

    A record holds `messages` (role and content), `conversations` (ShareGPT: from and value), or
    `prompt` and `completion`, each a text or a list of messages. It may hold `tools`, and a turn
    `tool_calls`. A record that holds no conversation, or one that the template refuses, is treated
    as `on_error` says. data=chat truncates conversations that are too long; a PackedDataModule
    splits them by default, as for any source: pass overlong="truncate" to it.

    Attributes:
        dataset: Name on the hub, or a folder, as in HubSource; instead of `files`.
        config: Configuration (subset) of the dataset, if it has several.
        split: Split to train on.
        held_out_split: Split to hold out. None holds out a part of `split`.
        revision: Git revision of the dataset.
        field: Name of the field that holds the messages. None takes messages, conversations, or
            prompt and completion, whichever a record has.
        encoding: Encoding of JSON lines. None takes the encoding of a file's byte-order mark, else
            UTF-8.
        train_on: Tokens to train on: those of every "assistant" turn, of the "last_assistant" turn,
            of the assistant turns in the "completion" of prompt and completion, or "all".
        chat_template: File with a chat template (Jinja). None takes the tokenizer's own.
        template_arguments: Further variables of the template, such as enable_thinking.
    """

    suffix: ClassVar[str] = ".jsonl"

    dataset: str = ""
    config: str | None = None
    split: str = "train"
    held_out_split: str | None = None
    revision: str | None = None
    field: str | None = None
    encoding: str | None = None
    train_on: str = "assistant"
    chat_template: str | None = None
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoding(self.encoding)
        object.__setattr__(self, "dataset", os.path.expanduser(self.dataset))
        require(
            self.train_on in TRAIN_ON,
            f"train_on must be one of {', '.join(TRAIN_ON)}, got {self.train_on!r}. assistant "
            "trains on every assistant turn.",
        )
        if self.dataset and self.files:
            raise ValueError(
                f"files must be left out with dataset, got both {list(self.files)} and "
                f"{self.dataset!r}. Leave one of data.files and data.dataset out."
            )
        if not self.dataset and not self.files:
            raise ValueError(
                "files must name at least one file or glob, or dataset a name on the hub, got "
                "none. Write for example 'data.files=[chats/*.jsonl]', with the quotes."
            )
        if self.chat_template is not None:
            path = os.path.expanduser(self.chat_template)
            object.__setattr__(self, "chat_template", path)
            require(
                Path(path).is_file(),
                f"chat_template must be a file with a Jinja template, got {path!r}, which is not "
                "one. Write the template into a file, or leave it out for the tokenizer's own.",
            )

    @cached_property
    def rendering(self) -> Rendering:
        """Settings that decide how conversations become tokens and labels. Reads the template file.

        Raises:
            ValueError: if the template file is not UTF-8.
        """
        template = None
        if self.chat_template is not None:
            try:
                template = Path(self.chat_template).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"chat_template must be UTF-8 text, got {self.chat_template!r} with byte "
                    f"{error.start} that is not. Convert the file."
                ) from error
        return Rendering(self.train_on, template, self.template_arguments)

    def load(self, cache_dir: Path) -> Dataset:
        """Returns the conversations as JSON text, up to the limits: see Source and FileSource."""
        if not self.dataset:
            return super().load(cache_dir)
        return self._load_split(self.split, cache_dir)

    def load_held_out(self, cache_dir: Path) -> Dataset | None:
        """Returns the conversations to hold out, or None if none are named: see Source."""
        if not self.dataset or self.held_out_files:
            return super().load_held_out(cache_dir)
        return self._load_split(self.held_out_split, cache_dir) if self.held_out_split else None

    def _load_split(self, split: str, cache_dir: Path) -> Dataset:
        where = {
            "path": self.dataset,
            "name": self.config,
            "split": split,
            "revision": self.revision,
        }
        records = load_split(where, cache_dir)
        conversations = chat_column(records, self.field, self.dataset)
        conversations = head(conversations, self.max_documents, self.max_bytes)
        return report_faults(conversations, self.on_error)

    def _read(self, files: tuple[File, ...], cache_dir: Path) -> Dataset:
        return generate(
            read_chat,
            cache_dir,
            self.on_error,
            files=files,
            field=self.field,
            encoding=self.encoding,
        )
