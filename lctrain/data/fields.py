"""The text of a record: a field, or a field of a field (`doc.text`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_REMEDY = "Set data.field to the field that holds the text."


class FieldError(ValueError):
    """A record without the field, or with another type than text in it."""


def find_field(record: Any, field: str) -> Any:
    """Returns the value of a field; a null on the way to it is None.

    Args:
        record: A record, in JSON an object.
        field: Its name; where no field has the whole name, dots lead into nested records.

    Raises:
        FieldError: if the record has no such field.
    """
    if not isinstance(record, Mapping):
        raise FieldError(f"a record must be an object with field {field!r}, got {kind(record)}.")
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            got = f"fields {sorted(value)}" if isinstance(value, Mapping) else kind(value)
            raise FieldError(
                f"a record must be an object with field {field!r}, got {got}. {_REMEDY}"
            )
        value = value[part]
    return value


def decode(value: Any, field: str) -> str | None:
    """Returns the text of a value: a string, UTF-8 in bytes, or None.

    Raises:
        FieldError: if the value is no text.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FieldError(
                f"field {field!r} must hold UTF-8, got a value with byte {error.start} that is not."
                " Convert it."
            ) from error
    raise FieldError(f"field {field!r} must be a string, got {kind(value)}. {_REMEDY}")


def replace_surrogates(text: str) -> tuple[str, str | None]:
    """Replaces surrogates, which no encoding can store, by U+FFFD; and says which was the first.

    JSON gives one for an escape such as \\ud83d without its second half.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return text, None
    what = f"an unpaired surrogate (\\u{ord(found.group()):04x}) at character {found.start()}"
    return _SURROGATE.sub("\ufffd", text), what


def missing_column(field: str, columns: Sequence[str], where: str = "") -> ValueError:
    """The error for data that lacks the text column."""
    return FieldError(
        f"{where}field must be a column of the data, got {field!r}; it has {sorted(columns)}. "
        "Set data.field to the column that holds the text."
    )


def kind(value: Any) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else type(value).__name__
