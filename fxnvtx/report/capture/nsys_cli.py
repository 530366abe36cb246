"""What nsys exports, as SQLite: a .nsys-rep by running nsys, and Arrow or Parquet tables.

A folder of tables (`nsys export --type=arrowdir`, `parquetdir`), or all of them in one file (`--type=arrow`), becomes a
temporary SQLite file with the same tables, as other programs' traces do: everything after it is the one reader's. Arrow
is read with nanoarrow, which the report needs anyway; Parquet needs pyarrow.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import CaptureError, ToolError
from .schema import one_line

__all__ = ["exported", "is_arrow", "is_tables", "tabled"]


@contextmanager
def exported(path: Path, tick: Callable[[int], None] | None = None) -> Iterator[Path]:
    """The SQLite export of a .nsys-rep, for the duration of the block. tick: called with 0 while nsys works."""
    if not path.stat().st_size:
        raise CaptureError(f"{path} is empty: the recording did not finish")
    nsys = shutil.which("nsys")
    if nsys is None:
        raise ToolError(
            f"{path} needs nsys to be read and nsys is not on the PATH: install Nsight Systems, or run"
            f" `nsys export --type sqlite {path.name}` where it is and give the .sqlite"
        )
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as folder:
        target = Path(folder) / (path.stem + ".sqlite")
        log = Path(folder) / "log"
        command = [nsys, "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(target), str(path)]
        with open(log, "wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            while True:
                try:
                    code = process.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    if tick is not None:
                        tick(0)
        if code or not target.exists():
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise ToolError(f"nsys could not export {path}: {_reason(said, code).replace(str(target), 'its export')}")
        yield target


def _reason(said: list[str], code: int) -> str:
    """The line of nsys that tells most: of a file that a newer one wrote, the line that says which."""
    lines = [" ".join(line.split()) for line in said if line.strip()]
    for word in ("newer", "created", "version"):
        telling = [line for line in lines if word in line.lower()]
        if telling:
            return f"{telling[0]} (use the nsys that wrote it)"
    return f"{lines[-1] if lines else f'exit code {code}'}; a newer nsys wrote it perhaps: use that one"


# --------------------------------------------------------------------------------------------------- folders of tables


_WANTED = (
    "NVTX_EVENTS",
    "StringIds",
    "CUPTI_ACTIVITY_KIND_",
    "CUDA_",
    "ENUM_CUDA_MEM",
    "META_DATA_EXPORT",
    "PROCESSES",
)
_FIRST = ("NVTX_EVENTS", "StringIds", "META_DATA_EXPORT")  # a folder with one of them is an export
_ENDINGS = (".arrow", ".parquet")
_SIGNED = 1 << 63


def is_tables(folder: Path) -> bool:
    """Whether a folder is one export, and no folder of captures."""
    return any((folder / f"{name}{ending}").is_file() for name in _FIRST for ending in _ENDINGS)


def is_arrow(head: bytes) -> bool:
    """Whether a file that begins so is Arrow's stream."""
    return head.startswith(b"\xff\xff\xff\xff")


@contextmanager
def tabled(source: Path) -> Iterator[Path]:
    """The folder, or the file with all tables, as SQLite, for the duration of the block. Raises CaptureError."""
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as place:
        target = Path(place) / f"{source.name}.sqlite"
        database = sqlite3.connect(target, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("BEGIN")
            if source.is_dir():
                for path in sorted(source.iterdir()):
                    if path.suffix in _ENDINGS and path.name.startswith(_WANTED):
                        _copy(path, _arrow(path) if path.suffix == ".arrow" else _parquet(path), database)
            else:
                _copy(source, _streams(source), database)
            database.execute("COMMIT")
        finally:
            database.close()
        yield target


Rows = Iterator[tuple[str, list[str], Iterator[tuple[Any, ...]]]]  # of a table: its name, its columns, some rows


def _copy(path: Path, tables: Rows, database: sqlite3.Connection) -> None:
    made: set[str] = set()
    try:
        for name, columns, rows in tables:
            table = _quoted(name)
            if name not in made:
                database.execute(f"CREATE TABLE {table} ({', '.join(_quoted(column) for column in columns)})")
                made.add(name)
            database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", map(_signed, rows))
    except CaptureError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
        UnicodeError,
        LookupError,
        AttributeError,
        sqlite3.Error,
    ) as error:
        # nanoarrow's and pyarrow's own errors are RuntimeErrors and ValueErrors
        raise CaptureError(
            f"{path} is damaged ({one_line(error)[:200]}): export it again with `nsys export`"
        ) from error


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _signed(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Unsigned numbers as the export to SQLite writes them."""
    return tuple(value - 2 * _SIGNED if type(value) is int and value >= _SIGNED else value for value in row)


def _arrow(path: Path) -> Rows:
    import nanoarrow  # type: ignore[import-untyped]
    from nanoarrow.ipc import InputStream  # type: ignore[import-untyped]

    if not path.stat().st_size:
        raise ValueError("it is empty")
    with InputStream.from_path(str(path)) as stream:
        arrays = nanoarrow.ArrayStream(stream)
        names = [field.name for field in arrays.schema.fields]
        yield path.stem, names, iter(())
        for array in arrays:
            yield path.stem, names, array.iter_tuples()


def _streams(path: Path) -> Rows:
    """One stream of Arrow's after the other; each says in its schema which table it is."""
    import nanoarrow
    from nanoarrow.ipc import InputStream

    size = path.stat().st_size
    found: set[str] = set()
    with open(path, "rb") as file:
        while file.tell() < size:
            with InputStream.from_readable(file) as stream:
                arrays = nanoarrow.ArrayStream(stream)
                said = dict(arrays.schema.metadata.items()) if arrays.schema.metadata is not None else {}
                table = said.get(b"table_name", b"").decode("utf-8", "replace")
                wanted = table.startswith(_WANTED) and table not in found
                found.add(table)
                names = [field.name for field in arrays.schema.fields]
                if wanted:
                    yield table, names, iter(())
                for array in arrays:
                    if wanted:
                        yield table, names, array.iter_tuples()
    if not found.intersection(_FIRST):
        raise CaptureError(f"{path} holds Arrow tables, but none that Nsight Systems exports")


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise CaptureError(
            f"{path.parent} holds Parquet tables, for which pyarrow is needed: `pip install pyarrow`, or export with"
            " --type=arrowdir or --type=sqlite"
        ) from error
    with parquet.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        yield path.stem, names, iter(())
        for batch in file.iter_batches():
            yield path.stem, names, zip(*(column.to_pylist() for column in batch.columns), strict=True)
