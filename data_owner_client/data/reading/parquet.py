"""Rows of Parquet files, read in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from data_owner_client.data.reading.forms import recognise
from data_owner_client.data.reading.problems import InvalidText
from data_owner_client.data.reading.settings import ReadingSettings
from protocol.errors import InvalidData

# Rows in memory at a time.
_BATCH_ROWS = 512


class ParquetRows:
    """The rows of a Parquet file.

    Args:
        file: the file, in which the reader can go back and forth.
        name: name of the file in errors.

    Raises:
        InvalidData: pyarrow is not installed, or the file is damaged.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InvalidData(
                f"{name} is a Parquet file, and pyarrow is not installed.",
                hint="Run: pip install -e '.[client,parquet]'.",
            ) from error
        self._name = name
        with self._readable():
            self._file = ParquetFile(file)
            self._names: list[str] = list(self._file.schema_arrow.names)

    def records(
        self, settings: ReadingSettings, *, need_targets: bool
    ) -> Iterator[tuple[int, dict[str, Any] | InvalidText]]:
        """Yield number and fields of each row, of which only the columns are read that its form has.

        Raises:
            InvalidData: the columns fit no form, or the file is damaged.
        """
        columns = self._columns(settings, need_targets=need_targets)
        batches, number = self._batches(columns), 0
        for rows in batches:
            for row in rows:
                number += 1
                yield number, row

    def label_names(self, column: str) -> tuple[str, ...]:
        """The names of a column's labels, which the `datasets` library writes into the file; empty if it has none."""
        metadata = self._file.schema_arrow.metadata or {}
        try:
            feature: Any = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][column]
            names = feature["names"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return ()
        return tuple(map(str, names)) if isinstance(names, list) else ()

    def _columns(self, settings: ReadingSettings, *, need_targets: bool) -> list[str] | None:
        """The columns that are read; None for all."""
        try:
            form = recognise(self._names, settings, need_targets=need_targets)
        except InvalidData as error:
            raise InvalidData(f"{self._name}: {error.detail}", hint=error.hint) from error
        if form is None:
            return None
        wanted = {part for key in (*form.keys, *form.optional) for part in (key, key.split(".")[0], "translation")}
        return [name for name in self._names if name in wanted]

    def _batches(self, columns: list[str] | None) -> Iterator[list[dict[str, Any]]]:
        with self._readable():
            batches = self._file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            while (batch := next(batches, None)) is not None:
                yield batch.to_pylist()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except UnicodeDecodeError as error:
            raise InvalidData(
                f"{self._name} has bytes that are not UTF-8 in a column of texts.", hint="Write the file again."
            ) from error
        except (pyarrow.ArrowException, OSError) as error:
            raise InvalidData(f"{self._name} is no Parquet file, or damaged.", hint="Write the file again.") from error
