"""Reads a column of strings or UTF-8 bytes from Parquet files, one row group after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lctrain.data.fields import FieldError, decode, missing_column
from lctrain.data.readers import File, Row, fault
from lctrain.data.streams import DAMAGE, PARQUET, known_type

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS_AT_A_TIME = 256


def read_parquet(files: tuple[File, ...], field: str) -> Iterator[Row]:
    """Yields one document per row of Parquet files.

    The column may hold strings, string views, dictionary-encoded strings or UTF-8 bytes. If a row
    group is damaged, its remaining rows are left out, and reading continues with the next row
    group.

    Args:
        files: Files to read: see `lctrain.data.readers`.
        field: Name of the column, or the path to a nested field, with dots.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (*DAMAGE, pa.ArrowException)
    for path, name, *_ in files:
        try:
            with pq.ParquetFile(path) as file:
                column = _find(file.schema_arrow, field, path)
                if file.metadata.num_rows == 0:
                    message = f"files must hold rows, got {path}, which has none. Leave it out."
                    yield fault(name, message, "")
                first = 0
                for group in range(file.num_row_groups):
                    try:
                        yield from _read_group(file, group, column, field, (path, name, first))
                    except damage as error:
                        yield fault(f"{name}:{first}", damaged(path, error, group))
                    first += file.metadata.row_group(group).num_rows
        except FieldError as error:
            yield fault(name, str(error))
        except damage as error:
            yield fault(name, damaged(path, error))


def _find(schema: pa.Schema, field: str, path: str) -> tuple[str, ...]:
    """Returns the names on the path to the text: the column, then the fields of nested structs.

    Raises:
        FieldError: if the file has no such field, or the field does not hold text.
    """
    import pyarrow as pa

    way = (field,) if field in schema.names else tuple(field.split("."))
    if way[0] not in schema.names:
        raise missing_column(field, schema.names, f"{path}: ")
    kind = schema.field(way[0]).type
    for name in way[1:]:
        if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
            known = [kind.field(i).name for i in range(kind.num_fields)]
            raise missing_column(field, [f"{way[0]}.{name}" for name in known], f"{path}: ")
        kind = kind.field(name).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(held) or pa.types.is_null(held)):
        raise FieldError(
            f"{path}: column {field!r} must hold strings, got {kind}. Set data.field to the column "
            "that holds the text."
        )
    return way


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    tests = ("string", "large_string", "binary", "large_binary", "fixed_size_binary")
    views = ("string_view", "binary_view")  # not in every pyarrow
    return any(getattr(pa.types, f"is_{test}", lambda _: False)(kind) for test in (*tests, *views))


def _read_group(
    file: Any, group: int, way: tuple[str, ...], field: str, place: tuple[str, str, int]
) -> Iterator[Row]:
    import pyarrow as pa

    path, name, row = place
    leaf = ".".join(way)
    for batch in file.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[leaf]):
        values = batch.column(way[0])
        for part in way[1:]:  # a null struct has null fields
            values = pa.compute.struct_field(values, part)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.type in (pa.string(), pa.large_string()):  # bytes: they need not be UTF-8
            values = values.cast(pa.large_binary())
        for value in values:
            try:
                yield {
                    "text": decode(value.as_py(), field),
                    "name": f"{name}:{row}",
                    "fault": None,
                }
            except (FieldError, UnicodeDecodeError) as error:
                yield fault(f"{name}:{row}", f"{path}: row {row}: {error}")
            row += 1


def damaged(path: str, error: BaseException, group: int | None = None) -> str:
    """Returns the message for a Parquet file, or one of its row groups, that cannot be read."""
    where = "is damaged or no Parquet file"
    if group is None:
        other = _other_type(path)
        if other is not None:
            return f"files must be Parquet files, got {path}, which is {other}"
    else:
        where = f"is damaged in row group {group}, which is left out"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"files must be Parquet files, got {path}, which {where} ({reason}). Restore the file, or "
        "leave it out of data.files."
    )


def _other_type(path: str) -> str | None:
    """Returns the known type of a file without the first bytes of Parquet, with the remedy."""
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return None
    return None if head.startswith(PARQUET) else known_type(head)
