"""Captures of Nsight Systems: what their tables say, and how their other forms become tables.

A .nsys-rep becomes SQLite by running nsys. A folder of tables (`nsys export --type=arrowdir`, `parquetdir`), or all of
them in one file (`--type=arrow`), becomes a temporary SQLite file with the same tables, as other programs' traces do:
everything after it is the one reader's. Arrow is read with nanoarrow, which the report needs anyway; Parquet needs
pyarrow.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...categories import COMPILE, MODULE
from ...categories import PIECE as PIECE_CATEGORY
from ...errors import CaptureError, ToolError
from ...recording import PREFIX, Entry, decoded
from ..labels import PIECE, Name, Span, clean, infer_category, numbered
from ..part import WHOLE, Gpu, Omitted, Part, Timeline, Window, omitted, timeline_of
from .schema import COPY, GRAPH, KERNEL, PROCESS, PUSH_POP, START_END, Schema, one_line

if TYPE_CHECKING:
    from ..attribution.batches import Source

__all__ = ["PUSH_POP", "START_END", "Reader", "exported", "is_arrow", "is_tables", "tabled"]


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


# ---------------------------------------------------------------------------------------------------------------------


CROSS_THREAD = "ranges that end on another thread than they began on were left out"


class Reader:
    def __init__(
        self,
        connection: sqlite3.Connection,
        schema: Schema,
        path: Path,
        exact: bool,
        tick: Callable[[int], None] | None,
        window: Window = WHOLE,
    ) -> None:
        self.connection = connection
        self.schema = schema
        self.path = path
        self.exact = exact
        self.window = window
        self.tick = tick
        self.notes: list[str] = list(schema.notes)
        self.texts: dict[int | None, str] = {}
        assert schema.nvtx is not None
        self.nvtx = schema.nvtx
        self.has_ranges = schema.nvtx.name in schema.tables  # a table of them, be it empty
        self.has_strings = schema.strings is not None
        self.copy_names = self._enum("ENUM_CUDA_MEMCPY_OPER")
        self.domains, self.categories = self._registered()
        self.entries = self._work()
        self.last = 0  # the last moment of any range
        self._nesting: list[int] | None = None

    def timeline(self, pid: int, part: Part) -> Timeline | None:
        return timeline_of(
            part.tree.root,
            lambda times: self.spans(pid, PUSH_POP, times),
            lambda times: self.device_work(pid, times),
        )

    # ------------------------------------------------------------------------------------------ small tables

    def _work(self) -> list[Entry]:
        """What fxnvtx has registered about its ranges. Strings are kept from before a capture range began, too."""
        if not self.has_strings:
            return []
        rows = self.connection.execute("SELECT value FROM StringIds WHERE value GLOB ? || '*'", (PREFIX,))
        return [entry for (text,) in rows if isinstance(text, str) and (entry := decoded(text)) is not None]

    def gpus(self) -> list[Gpu]:
        try:
            rows = self.connection.execute("SELECT name, memoryBandwidth FROM TARGET_INFO_GPU").fetchall()
        except sqlite3.OperationalError:  # no such table, or another form of it
            return []
        return [Gpu(name, width if type(width) is int else 0) for name, width in rows if isinstance(name, str)]

    def _enum(self, table: str) -> dict[int, str]:
        try:
            return dict(self.connection.execute(f"SELECT id, label FROM {table}").fetchall())
        except sqlite3.OperationalError:
            return {}

    def text(self, key: int | None) -> str:
        text = self.texts.get(key)
        if text is None:
            row = None
            if self.has_strings:
                row = self.connection.execute("SELECT value FROM StringIds WHERE id = ?", (key,)).fetchone()
            text = self.texts[key] = str(row[0]) if row else f"(text {key} is missing)"
        return text

    def _registered(self) -> tuple[dict[tuple[int, int], str], dict[tuple[int, int, int], str]]:
        """Names of domains by (process, domain), and of categories by (process, domain, category)."""
        nvtx = self.nvtx
        domains: dict[tuple[int, int], str] = {}
        categories: dict[tuple[int, int, int], str] = {}
        for kind, tid, domain, category, text, key in self.connection.execute(
            f"SELECT eventType, globalTid, {nvtx.pick('domainId', default='0')}, {nvtx.pick('category')}, text,"
            f" {nvtx.pick('textId')} FROM {nvtx.sql} WHERE eventType IN (33, 75) ORDER BY start DESC"
        ):
            if tid is None:
                continue
            name = text if text is not None else self.text(key) if key is not None else ""
            pid = tid & ~0xFFFFFF
            if kind == 75:
                domains[pid, domain or 0] = name
            elif category is not None:
                categories[pid, domain or 0, category] = name
        return domains, categories

    def processes(self) -> list[int]:
        """Every process with a range or an operation, and what is wrong with their rows."""
        kinds = ", ".join(map(str, PUSH_POP + START_END))
        other_end = f"{self.nvtx.pick('endGlobalTid')} != globalTid"
        found: set[int] = set()
        lost = 0
        for pid, last, backwards, elsewhere in self.connection.execute(
            f"SELECT globalTid & {PROCESS}, max(max(start), max(coalesce(end, start))), sum(end < start),"
            f" sum(eventType IN ({kinds}) AND {other_end})"
            f" FROM {self.nvtx.sql} GROUP BY 1"
        ):
            self.last = max(self.last, last or 0)
            lost += elsewhere or 0
            if backwards:
                self.notes.append(f"{backwards:,} ranges end before they begin and were left out")
            if pid is None:
                self.notes.append("some ranges do not say which thread they are from and were left out")
                continue
            found.add(pid)
        for table in (self.schema.kernel, self.schema.memcpy, self.schema.memset, self.schema.graph_trace):
            if table is not None:
                found.update(
                    row[0]
                    for row in self.connection.execute(f"SELECT DISTINCT {self.schema.process(table)} FROM {table.sql}")
                    if row[0] is not None
                )
        if lost:
            self.notes.append(f"{lost:,} {CROSS_THREAD}")
        return sorted(found)

    # ------------------------------------------------------------------------------------------ one process

    def nesting(self, source: Source | None = None) -> list[int]:
        """The rows (rowid) of the start/end ranges that belong into their threads' trees: `attribution.tasks`."""
        if self._nesting is None:
            # not at the top: numpy is imported only when a capture is read
            from ..attribution.batches import Source
            from ..attribution.tasks import rows_that_nest

            source = source or Source(self.connection, self.path, adbc=False)
            self._nesting = rows_that_nest(self.connection, source, self.nvtx, self.domains, self.text)
            if self._nesting:
                self.connection.execute("CREATE TEMP TABLE fx_nesting (row INTEGER PRIMARY KEY)")
                self.connection.executemany("INSERT INTO temp.fx_nesting VALUES (?)", ((n,) for n in self._nesting))
        return self._nesting

    def spans(self, pid: int, kinds: tuple[int, ...], times: tuple[int, int] = (-(1 << 62), 1 << 62)) -> Iterator[Span]:
        """Ranges that start within a time, by thread, start, and end downwards. Start/end ranges that belong into a
        thread's tree count as push/pop."""
        nvtx, exact, last = self.nvtx, self.exact, self.last
        chosen = f"eventType IN ({', '.join(map(str, kinds))})"
        if self.nesting():
            nests = "rowid IN (SELECT row FROM temp.fx_nesting)"
            chosen = f"({chosen} OR {nests})" if kinds == PUSH_POP else f"{chosen} AND NOT {nests}"
        payload = nvtx.pick("int64Value", "uint64Value", "int32Value", "uint32Value")
        rows = self.connection.execute(
            f"SELECT globalTid, start, end, {nvtx.pick('textId')}, text, {nvtx.pick('domainId', default='0')},"
            f" {nvtx.pick('category')}, {payload} FROM {nvtx.sql}"
            f" WHERE {chosen} AND globalTid BETWEEN ? AND ?"
            f" AND (end IS NULL OR end >= start)"
            f" AND ({nvtx.pick('endGlobalTid')} IS NULL OR {nvtx.pick('endGlobalTid')} = globalTid)"
            " AND start >= ? AND start < ?"
            " ORDER BY globalTid, start, coalesce(end, 9223372036854775807) DESC, rowid",
            (pid, pid | 0xFFFFFF, *times),
        )
        names: dict[Any, Name] = {}
        tick = self.tick
        for done, (tid, start, end, key, text, domain, category, value) in enumerate(rows, 1):
            where = (key if key is not None else text, domain, category)
            name = names.get(where)
            if name is None:
                if text is None:
                    text = self.text(key) if key is not None else ""
                name = self.name(pid, text if exact else clean(text), domain or 0, category)
                if len(names) > 200_000:
                    names.clear()  # texts that never repeat
                names[where] = name
            if name[1] == PIECE_CATEGORY:
                name, value = Name(name[0], MODULE, name[2]), PIECE
            elif value is not None and not exact and name[1] in ("step", "request"):
                name = Name(numbered(name[0], name[1], value), name[1], name[2])
            if tick is not None and not done & 0x3FFF:
                tick(0x4000)
            if end is None:
                yield tid, start, max(last, start), name, value, True
            else:
                yield tid, start, end, name, value, False

    def device_work(self, pid: int, times: tuple[int, int] | None = None) -> Iterator[tuple[int, int, int, int, str]]:
        """(device, stream, start, end, name) of every operation, by device, stream and start. times: only what was
        launched within."""
        runtime = self.schema.runtime
        if times is not None and runtime is None:
            return
        launched = ""
        if times is not None and runtime is not None:
            launched = (
                f" AND correlationId IN (SELECT correlationId FROM {runtime.sql} WHERE globalTid BETWEEN {pid} AND"
                f" {pid | 0xFFFFFF} AND start >= {times[0]} AND start < {times[1]})"
            )
        sources = []
        for kind, table in enumerate((self.schema.kernel, self.schema.memcpy, self.schema.memset)):
            if table is not None:
                name = (table.pick("demangledName", "shortName"), "copyKind", "0")[kind]
                sources.append(
                    f"SELECT deviceId AS device, {table.pick('streamId', default='0')} AS stream, start, end,"
                    f" {kind} AS kind, {name} AS name FROM {table.sql}"
                    f" WHERE {self.schema.process(table)} = {pid} AND end >= start{launched}"
                )
        if not sources:
            return
        names: dict[tuple[int, int], str] = {}
        for device, stream, start, end, kind, key in self.connection.execute(
            " UNION ALL ".join(sources) + " ORDER BY device, stream, start"
        ):
            if (kind, key) not in names:
                names[kind, key] = self.operation(kind, key)
            yield device, stream, start, end, names[kind, key]

    def operation(self, kind: int, key: int | None) -> str:
        """What an operation is called: the kernel's name, or the kind of copy."""
        if kind == KERNEL:
            return self.text(key)
        if kind == COPY:
            return f"[memcpy {self.copy_names.get(key, str(key)) if key is not None else None}]"
        return "[memset]" if kind != GRAPH else f"[CUDA graph {key}]"

    def name(self, pid: int, text: str, domain: int, category: int | None) -> Name:
        spelled = self.domains.get((pid, domain), "")
        named = self.categories.get((pid, domain, category)) if category is not None else None
        return Name(text, named or infer_category(text), "" if spelled == "fxnvtx" else spelled)

    def omitted(self, pid: int, spans: Callable[[], Iterator[Span]]) -> Omitted:
        """What of a process the window leaves out. spans: gives its ranges, as far as `window.heads` needs them."""
        window = self.window
        some = any(owner[0] == pid and name == COMPILE for owner, name in self.categories.items())
        if not some and not window.compiling:
            window = replace(window, compiling=True)  # nothing was: saves a pass over the ranges
        return omitted(spans, window)
