"""text_column: reads the text column of a `datasets.Dataset`, strings or UTF-8 bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lctrain.data.fields import FieldError, decode, find_field, missing_column
from lctrain.data.readers import fault

if TYPE_CHECKING:
    from datasets import Dataset

_STRINGS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")


def text_column(dataset: Dataset, field: str, label: str) -> Dataset:
    """Returns a dataset with the texts as its column "text".

    A column of strings is only renamed. Another column is converted, and the dataset then has the
    columns "name" and "fault" as well: see `lctrain.data.readers`.

    Args:
        dataset: Dataset with the column.
        field: Name of the column, or the path to a nested field, with dots.
        label: Name of the dataset. A document's name is label:row.

    Raises:
        ValueError: if there is no such column, or it holds neither strings nor bytes.
    """
    columns = dataset.column_names
    way = [field] if field in columns else field.split(".")
    if way[0] not in columns:
        raise missing_column(field, columns)
    feature: Any = dataset.features[way[0]]
    for part in way[1:]:
        if not isinstance(feature, dict) or part not in feature:
            known = feature if isinstance(feature, dict) else ()
            raise missing_column(field, [f"{way[0]}.{name}" for name in known] or columns)
        feature = feature[part]
    kind = getattr(feature, "dtype", None)
    if kind not in (*_STRINGS, *_BYTES, "null"):
        raise FieldError(
            f"column {field!r} must hold strings, got {feature}. Set data.field to the column that "
            "holds the text."
        )
    dataset = dataset.select_columns([way[0]])
    if len(way) == 1 and kind in _STRINGS[:2]:
        return dataset if field == "text" else dataset.rename_column(field, "text")
    from datasets import Features, Value

    strings = {"name": Value("string"), "fault": Value("string")}
    return dataset.map(
        _rows,
        batched=True,
        batch_size=100,
        with_indices=True,
        fn_kwargs={"field": field, "column": way[0], "label": label},
        remove_columns=[way[0]],
        features=Features({"text": Value("large_string"), **strings}),
        desc="Reading texts",
    )


def _rows(
    batch: dict[str, list[Any]], numbers: list[int], field: str, column: str, label: str
) -> dict[str, list[str | None]]:
    rows = []
    for number, value in zip(numbers, batch[column], strict=True):
        name = f"{label}:{number}"
        try:
            text = decode(find_field({column: value}, field), field)
            rows.append({"text": text, "name": name, "fault": None})
        except FieldError as error:
            rows.append(fault(name, f"{name}: {error}"))
    return {key: [row[key] for row in rows] for key in ("text", "name", "fault")}
