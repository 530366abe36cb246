"""What nsys exports, as SQLite: a .nsys-rep by running nsys, and folders of Arrow or Parquet tables.

A folder (`nsys export --type=arrowdir`, `parquetdir`) becomes a temporary SQLite file with the same tables, as other
programs' traces do: everything after it is the one reader's. Arrow is read with nanoarrow, which the report needs
anyway; Parquet needs pyarrow.
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

__all__ = ["exported", "is_tables", "tabled"]


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


@contextmanager
def tabled(folder: Path) -> Iterator[Path]:
    """The folder as an SQLite file, for the duration of the block. Raises CaptureError."""
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as place:
        target = Path(place) / f"{folder.name}.sqlite"
        database = sqlite3.connect(target, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = OFF")
            database.execute("PRAGMA synchronous = OFF")
            database.execute("BEGIN")
            for path in sorted(folder.iterdir()):
                if path.suffix in _ENDINGS and path.name.startswith(_WANTED):
                    _copy(path, database)
            database.execute("COMMIT")
        finally:
            database.close()
        yield target


def _copy(path: Path, database: sqlite3.Connection) -> None:
    read = _arrow if path.suffix == ".arrow" else _parquet
    table = '"' + path.stem.replace('"', '""') + '"'
    made = False
    try:
        for names, rows in read(path):
            if not made:
                columns = ", ".join('"' + name.replace('"', '""') + '"' for name in names)
                database.execute(f"CREATE TABLE {table} ({columns})")
                made = True
            database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(names))})", map(_signed, rows))
    except CaptureError:
        raise
    except (
        OSError,
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
        UnicodeError,
        KeyError,
        sqlite3.Error,
    ) as error:
        # nanoarrow's and pyarrow's own errors are RuntimeErrors and ValueErrors
        raise CaptureError(
            f"{path} is damaged ({one_line(error)[:200]}): export it again with `nsys export`"
        ) from error


def _signed(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """Unsigned numbers as the export to SQLite writes them."""
    return tuple(value - 2 * _SIGNED if type(value) is int and value >= _SIGNED else value for value in row)


def _arrow(path: Path) -> Iterator[tuple[list[str], Iterator[tuple[Any, ...]]]]:
    import nanoarrow  # type: ignore[import-untyped]
    from nanoarrow.ipc import InputStream  # type: ignore[import-untyped]

    if not path.stat().st_size:
        raise ValueError("it is empty")
    with InputStream.from_path(str(path)) as stream:
        arrays = nanoarrow.ArrayStream(stream)
        names = [field.name for field in arrays.schema.fields]
        yield names, iter(())
        for array in arrays:
            yield names, array.iter_tuples()


def _parquet(path: Path) -> Iterator[tuple[list[str], Iterator[tuple[Any, ...]]]]:
    try:
        from pyarrow import parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise CaptureError(
            f"{path.parent} holds Parquet tables, for which pyarrow is needed: `pip install pyarrow`, or export with"
            " --type=arrowdir or --type=sqlite"
        ) from error
    with parquet.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        yield names, iter(())
        for batch in file.iter_batches():
            yield names, zip(*(column.to_pylist() for column in batch.columns), strict=True)
