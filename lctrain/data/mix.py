"""SourceMix: several sources of documents, each with a weight, a number of epochs and limits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lctrain.config_errors import explain_config_error
from lctrain.data.chat.source import ChatSource
from lctrain.data.hub import HubSource
from lctrain.data.packages import PackagesSource
from lctrain.data.sources import JsonlSource, ParquetSource, Source, StdlibSource, TextSource
from lctrain.limits import OVERLONG, named, require

KINDS: dict[str, type[Source]] = {
    "stdlib": StdlibSource,
    "packages": PackagesSource,
    "text": TextSource,
    "jsonl": JsonlSource,
    "parquet": ParquetSource,
    "hub": HubSource,
    "chat": ChatSource,
}
_NAME = re.compile(r"\w[\w.-]*")
_OWN = ("name", "weight", "epochs", "overlong")  # fields of SourcePart that a mapping may set


@dataclass(frozen=True, kw_only=True)
class SourcePart:
    """One source of a mix.

    Attributes:
        source: Source of the documents.
        name: Name of the source in the log and the reports. None takes the kind of the source.
        weight: Share of the tokens of a pass over the mix, relative to the other weights. Either
            all sources have a weight, or it is None in all; then `epochs` decides.
        epochs: Times that every document is read in a pass over the mix, above 0; a fraction reads
            a part of the documents. With weights it is a limit.
        overlong: Treatment of a document that is too long: "split", "truncate" or "drop". None
            truncates conversations, and takes the data module's setting for texts.

    Raises:
        ValueError: if a value is out of range.
    """

    source: Source
    name: str | None = None
    weight: float | None = None
    epochs: float = 1.0
    overlong: str | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.source, Source),
            f"source must be a Source, got {self.source!r}. Pass for example a TextSource.",
        )
        require(
            self.name is None or (isinstance(self.name, str) and bool(_NAME.fullmatch(self.name))),
            f"name must consist of letters, digits, '_', '-' and '.', got {self.name!r}. It is "
            "part of the names of metrics.",
        )
        for name in ("weight", "epochs"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(
                (value is None and name == "weight") or (number and 0 < value < float("inf")),
                f"{name} must be a number above 0, got {value!r}. Leave a source out to skip it.",
            )
        require(
            self.overlong is None or self.overlong in OVERLONG,
            f"overlong must be one of {', '.join(OVERLONG)}, got {self.overlong!r}. split loses no "
            "token.",
        )
        require(
            not getattr(self.source, "endless", False),
            f"max_documents or max_bytes must be set for the stream of {self.source!r} in a mix, "
            "got neither. A mix reads its sources before training.",
        )

    @property
    def kind(self) -> str:
        """Kind of the source, as in data=KIND; the name of the class for others."""
        known = [kind for kind, made in KINDS.items() if type(self.source) is made]
        return known[0] if known else type(self.source).__name__

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return isinstance(self.source, ChatSource)


@dataclass(frozen=True, kw_only=True)
class SourceMix:
    """Several sources, whose documents are packed together. Every source has a held-out set.

    With weights, a pass over the mix is the longest in which the tokens have the shares of the
    weights and no source is read more than its `epochs` times.

    Attributes:
        sources: SourceParts, or mappings with `kind` (stdlib, packages, text, jsonl, parquet, hub
            or chat), the settings of that source, and `name`, `weight`, `epochs` and `overlong`.

    Raises:
        ValueError: if a source is wrong; the message begins with its place, such as sources[0].
    """

    sources: list[Any] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        parts = self.parts  # raises for a wrong source
        weighted = sum(part.weight is not None for part in parts)
        require(
            weighted in (0, len(parts)),
            f"sources must all have a weight or none, got {weighted} of {len(parts)}. Add it to "
            "the others, or use epochs.",
        )
        chats = [part.source for part in parts if isinstance(part.source, ChatSource)]
        given = [chat.rendering.template for chat in chats if chat.rendering.template is not None]
        templates = set(given)
        require(
            len(templates) < 2,
            "sources must share one chat_template, got several. The trained model is saved with "
            "one.",
        )
        require(
            len(given) in (0, len(chats)),
            f"sources must share one chat_template, got it in {len(given)} of {len(chats)} chat "
            "sources. Set it in the others, too; it would render their conversations.",
        )

    @cached_property
    def parts(self) -> tuple[SourcePart, ...]:
        """The sources, each with a name of its own."""
        require(
            isinstance(self.sources, Sequence) and len(self.sources) > 0,
            f"sources must list at least one source, got {self.sources!r}. Write for example "
            "'data.sources=[{kind: text, files: [books/*.txt]}]', with the quotes.",
        )
        parts = []
        for number, given in enumerate(self.sources):
            with placed(f"sources[{number}]"):
                parts.append(given if isinstance(given, SourcePart) else part_of(given))
        return _with_names(parts)


def part_of(settings: Any, own: Sequence[str] = _OWN) -> SourcePart:
    """Returns the source that a mapping describes.

    Args:
        settings: Mapping with `kind`, the settings of that source, and the keys in `own`.
        own: Fields of SourcePart that the mapping may have.

    Raises:
        ValueError: if a key is unknown or missing, or a value does not fit.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    require(
        isinstance(settings, Mapping),
        f"a source must be a mapping with kind, got {settings!r}. Write {{kind: text, ...}}.",
    )
    kind = settings.get("kind")
    require(
        kind in KINDS,
        f"kind must be one of {', '.join(KINDS)}, got {kind!r}. It is the X of data=X.",
    )
    made = KINDS[kind]
    known = [field.name for field in dataclasses.fields(made)]
    values = {key: value for key, value in settings.items() if key not in ("kind", *own)}
    unknown = [key for key in values if key not in known]
    require(
        not unknown,
        f"the keys of a {kind} source must be among kind, {', '.join([*own, *known])}; got "
        f"{', '.join(map(repr, unknown))}. Check the spelling.",
    )
    for key in ("files", "held_out_files"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    try:
        source = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(made), values))
    except OmegaConfBaseException as error:
        raise ValueError(explain_config_error(error)) from error
    assert isinstance(source, Source)
    return SourcePart(source=source, **{key: settings[key] for key in own if key in settings})


def overlong_of(source: Source, own: str | None, default: str) -> str:
    """Returns the treatment of a source's overlong documents: "split", "truncate" or "drop".

    Args:
        source: The source.
        own: The source's own setting. With None, conversations are truncated, and texts take
            `default`.
        default: Setting of the data module.
    """
    if own is not None:
        return own
    return "truncate" if isinstance(source, ChatSource) else default


@contextmanager
def placed(place: str) -> Iterator[None]:
    """Context manager that puts the place of a setting before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def named_sets(sets: Any) -> dict[str, Source]:
    """Returns held-out sets by name as sources.

    Args:
        sets: Mapping from the name of a set to a Source, or to a mapping with `kind` and the
            settings of that source. None for no set.

    Raises:
        ValueError: if a name or a source is wrong; the message begins with its place.
    """
    found = {}
    require(
        sets is None or isinstance(sets, Mapping),
        f"held_out_sets must be sources by name, got {sets!r}. Write "
        "{NAME: {kind: text, ...}}.",
    )
    for name, given in (sets or {}).items():
        with placed(f"held_out_sets.{name}"):
            part = SourcePart(source=given) if isinstance(given, Source) else part_of(given, ())
            found[name] = SourcePart(source=part.source, name=name).source
    return found


def sources_of(data: Any) -> dict[str, Any]:
    """Returns every source of the settings of the config group `data`, by its place in messages.

    Args:
        data: Settings of the data, which include those of a source or of a mix.

    Raises:
        ValueError: if a setting of a source is wrong; the message names the place.
    """
    with named("data."):
        sets = named_sets(data.held_out_sets)
    found = {f"data.held_out_sets.{name}": source for name, source in sets.items()}
    if not isinstance(data, SourceMix):
        return {"data": data} | found
    parts = enumerate(data.parts)
    return {f"data.sources[{number}]": part.source for number, part in parts} | found


def _with_names(parts: Sequence[SourcePart]) -> tuple[SourcePart, ...]:
    """Gives every part a name: its own, or its kind, with a number where kinds repeat."""
    kinds = [part.kind for part in parts if part.name is None]
    found = []
    for number, part in enumerate(parts):
        name = part.name
        if name is None:
            name = part.kind if kinds.count(part.kind) == 1 else f"{part.kind}_{number}"
        found.append(dataclasses.replace(part, name=name))
    names = [part.name for part in found]
    require(
        len(set(names)) == len(names),
        f"sources must have different names, got {', '.join(map(str, names))}. Set name.",
    )
    return tuple(found)
