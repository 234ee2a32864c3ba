"""Readers of conversations: JSON lines, Parquet files, and datasets of the hub.

They yield the rows of `lctrain.data.readers`, with a conversation as JSON text.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from lctrain.data.chat.conversation import USED, read_conversation
from lctrain.data.fields import FieldError, replace_surrogates
from lctrain.data.parquet import damaged
from lctrain.data.readers import File, Row, fault, read_json_lines
from lctrain.data.streams import DAMAGE, PARQUET, open_bytes

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_A_TIME = 256


def read_chat(
    files: tuple[File, ...], field: str | None = None, encoding: str | None = None
) -> Iterator[Row]:
    """Yields one conversation per JSON line or Parquet row; the file's first bytes tell its type.

    Args:
        files: Files to read: see `lctrain.data.readers`.
        field: Name of the field that holds the messages; see `read_conversation`.
        encoding: Encoding of JSON lines; None as in `read_jsonl`.
    """
    read = partial(read_conversation, field=field)
    for file in files:
        try:
            with open_bytes(file[0]) as stream:
                is_parquet = stream.read(len(PARQUET)) == PARQUET
        except DAMAGE:
            is_parquet = False  # the reader of lines reports the damage
        if is_parquet:
            yield from _read_parquet(file, field)
        else:
            yield from read_json_lines((file,), read, "a conversation", encoding)


def _read_parquet(file: File, field: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path, name, *_ = file
    damage = (*DAMAGE, pa.ArrowException)
    row = 0
    try:
        with pq.ParquetFile(path) as opened:
            if opened.metadata.num_rows == 0:
                message = f"files must hold rows, got {path}, which has none. Leave it out."
                yield fault(name, message, "")
            used = [c for c in opened.schema_arrow.names if c in (*USED, str(field).split(".")[0])]
            if not used:
                read_conversation(dict.fromkeys(opened.schema_arrow.names), field)
            for batch in opened.iter_batches(_ROWS_AT_A_TIME, columns=used):
                for record in batch.to_pylist():
                    yield _row(record, field, f"{name}:{row}", f"{path}: row {row}")
                    row += 1
    except FieldError as error:
        yield fault(name, f"{path}: {error}")
    except damage as error:
        yield fault(f"{name}:{row}", damaged(path, error))


def chat_column(dataset: Dataset, field: str | None, label: str) -> Dataset:
    """Returns the conversations of a dataset, with the columns "text", "name" and "fault".

    Args:
        dataset: Dataset whose rows are records.
        field: Name of the field that holds the messages; see `read_conversation`.
        label: Name of the dataset. A conversation's name is label:row.
    """
    from datasets import Features, Value

    texts = {"text": Value("large_string"), "name": Value("string"), "fault": Value("string")}
    return dataset.map(
        _rows,
        batched=True,
        batch_size=_ROWS_AT_A_TIME,
        with_indices=True,
        fn_kwargs={"field": field, "label": label},
        remove_columns=dataset.column_names,
        features=Features(texts),
        desc="Reading conversations",
    )


def _rows(
    batch: dict[str, list[Any]], numbers: list[int], field: str | None, label: str
) -> dict[str, list[str | None]]:
    records = ({key: batch[key][i] for key in batch} for i in range(len(numbers)))
    rows = [
        _row(record, field, f"{label}:{number}", f"{label}:{number}")
        for number, record in zip(numbers, records, strict=True)
    ]
    return {key: [row[key] for row in rows] for key in ("text", "name", "fault")}


def _row(record: Any, field: str | None, name: str, where: str) -> Row:
    """Returns the row of one record of a table, whose columns may be null."""
    try:
        text, _ = replace_surrogates(read_conversation(record, field, without_nulls=True))
        return {"text": text, "name": name, "fault": None}
    except FieldError as error:
        return fault(name, f"{where}: {error}")
