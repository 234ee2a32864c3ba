"""Finds the text field of a record, also inside nested records (`doc.text`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_REMEDY = "Set data.field to the field that holds the text."


class FieldError(ValueError):
    """Raised if a record lacks the text field, or if the field does not hold text."""


def find_field(record: Any, field: str) -> Any:
    """Returns the value of a field; None if the field, or a record that contains it, is null.

    Args:
        record: A mapping, such as a JSON object. Any other value raises FieldError.
        field: Name of the field. If the record has no field of this name, the name is split at its
            dots into a path through nested records.

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
    """Returns a value as text: strings and None as they are, bytes decoded as UTF-8.

    Args:
        value: Value of the field.
        field: Name of the field, for the message.

    Raises:
        FieldError: if the value has another type, or its bytes are not UTF-8.
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
    """Replaces unpaired surrogates by U+FFFD, since no encoding can store them.

    JSON yields an unpaired surrogate for an escape such as \\ud83d without its second half.

    Returns:
        The text, and a description of its first surrogate; None if it has none.
    """
    found = _SURROGATE.search(text)
    if found is None:
        return text, None
    what = f"an unpaired surrogate (\\u{ord(found.group()):04x}) at character {found.start()}"
    return _SURROGATE.sub("\ufffd", text), what


def missing_column(field: str, columns: Sequence[str], where: str = "") -> ValueError:
    """Returns the error for data that lacks the text column.

    Args:
        field: Name of the column that was looked for.
        columns: Names of the columns that the data have.
        where: Text at the beginning of the message, such as the path of the file.
    """
    return FieldError(
        f"{where}field must be a column of the data, got {field!r}; it has {sorted(columns)}. "
        "Set data.field to the column that holds the text."
    )


def kind(value: Any) -> str:
    """Returns the name of a value's type for messages; "null" for None."""
    return "null" if value is None else type(value).__name__
