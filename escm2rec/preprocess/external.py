"""Grouping and sorting of more rows than memory holds: on disk, by duckdb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from escm2rec.disk import DISK_LIMIT
from escm2rec.errors import RunError
from escm2rec.parallel import default_workers

LEAST_BYTES = 256 << 20
"""With less, duckdb gives up on sorts that it could do on disk: its blocks are of 256 KiB, a buffer or more a thread."""


@contextmanager
def database(folder: Path, memory_bytes: int, file: str = ":memory:", hint: str = "pass a larger --memory-gib") -> Iterator[Any]:
    """A duckdb connection that takes `memory_bytes` (LEAST_BYTES at least), and goes to `folder`, which is made, beyond.

    `file` in the folder holds its tables, where there are some. RunError, with `hint`, when that memory does not do.
    """
    import duckdb

    folder.mkdir(parents=True, exist_ok=True)
    limits = {"memory_limit": f"{max(memory_bytes, LEAST_BYTES) >> 20}MiB", "threads": default_workers(), "temp_directory": str(folder)}
    with closing(duckdb.connect(file if file == ":memory:" else str(folder / file), config=limits)) as connection:
        connection.execute("SET enable_progress_bar = false")  # of a worker it goes to stdout, among the results
        try:
            yield connection
        except duckdb.OutOfMemoryException as error:
            if DISK_LIMIT in str(error):
                raise  # `telling_of_disk` says it
            raise RunError(f"cannot sort with {limits['memory_limit']}: {error}", hint) from error


def query(sql: str, rows: pa.RecordBatchReader, folder: Path, memory_bytes: int, table_rows: int) -> Iterator[pa.Table]:
    """What `sql` says of the table `rows`, in tables of `table_rows` rows (the last may have fewer).

    What does not fit `memory_bytes` (LEAST_BYTES at least) goes to `folder`, which is made and left empty. RunError as of `database`.
    """
    with database(folder, memory_bytes) as connection:
        connection.register("rows", rows)
        waiting: list[pa.RecordBatch] = []
        held = 0
        for batch in connection.sql(sql).to_arrow_reader(table_rows):
            waiting.append(batch)
            held += len(batch)
            while held >= table_rows:
                whole = pa.Table.from_batches(waiting)
                yield whole.slice(0, table_rows)
                waiting, held = whole.slice(table_rows).to_batches(), held - table_rows
        if held:
            yield pa.Table.from_batches(waiting)
