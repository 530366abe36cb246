"""The one writer of every file and every line that fxnvtx gives out; and text made safe for where it goes.

A regular file takes its name only when it is whole (temporary file, then rename); links are followed and modes kept;
pipes and devices are written to and never replaced; what is being read is never written. "-" is stdout.

Labels and file names are other programs' text. Escape sequences in them would move the cursor or set the title,
bidirectional marks would turn lines around, a line end would begin a row of its own.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from .errors import OutputError

__all__ = [
    "STDOUT",
    "check_target",
    "complain",
    "csv_cell",
    "cut",
    "json_text",
    "pad",
    "printable",
    "printable_lines",
    "say",
    "width_of",
    "write_bytes",
    "write_text",
    "writing",
    "writing_file",
    "wrote",
]


# Unicode's categories Cc, Cf, Cs, Zl and Zp: controls, formats (bidirectional marks among them), line separators
_HIDDEN = (
    "\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890-\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f"
)
_UNPRINTABLE = re.compile(f"[{_HIDDEN}]")
_UNPRINTABLE_IN_LINES = re.compile(f"(?!\n)[{_HIDDEN}]")
_FORMULA = ("=", "+", "-", "@")


def printable(text: str) -> str:
    """The text with every character that is not shown as a glyph written as its escape, line ends included."""
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub(_escape, text)


def printable_lines(text: str) -> str:
    """`printable` for a text of several lines, which stay lines."""
    return _UNPRINTABLE_IN_LINES.sub(_escape, text)


def csv_cell(text: str) -> str:
    """Text for a cell of a spreadsheet, which would compute what begins like a formula: that gets a `'` in front."""
    text = printable(text)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def json_text(document: Any, indent: int | None = None) -> str:
    """JSON with letters of every script as they are and everything unprintable as an escape."""
    text = json.dumps(document, ensure_ascii=False, indent=indent)
    if text.isascii() and text.isprintable():
        return text
    return _UNPRINTABLE_IN_LINES.sub(lambda match: json.dumps(match[0])[1:-1], text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


# ------------------------------------------------------------------------------------------------ columns


def width_of(text: str) -> int:
    """How many columns of a terminal a printable text takes."""
    return len(text) if text.isascii() else sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def pad(text: str, width: int, right: bool = False) -> str:
    """The text filled up to `width` columns, on its left where `right` is set."""
    space = " " * (width - width_of(text))
    return space + text if right else text + space


def cut(text: str, width: int) -> str:
    """As much of the text's beginning as fits in `width` columns."""
    if width_of(text) <= width:
        return text
    kept, room = [], width
    for character in text:
        room -= _columns(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept)


# ---------------------------------------------------------------------------------------------------------------------


PathLike = str | os.PathLike[str]
STDOUT = "-"
_SIDE_FILES = ("", "-wal", "-shm", "-journal")  # what SQLite keeps beside a database belongs to it


@contextmanager
def writing(path: PathLike, inputs: Iterable[PathLike] = ()) -> Iterator[TextIO]:
    """A text file (UTF-8, line ends as written) that takes its place when the block ends well.

    path: "-" is stdout. inputs: files that are being read, which must not be written. Raises OutputError, in one line;
    BrokenPipeError where whoever read stdout has gone.
    """
    if is_stdout(path):
        with _stdout_errors():
            yield _Encodable(sys.stdout)  # type: ignore[misc]
            sys.stdout.flush()
        return
    with (
        writing_file(path, inputs, streams=True) as place,
        _errors(path),
        # a lone surrogate has no bytes: its escape is what JSON writes for it, too
        open(place, "w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        yield file


@contextmanager
def writing_file(path: PathLike, inputs: Iterable[PathLike] = (), streams: bool = False) -> Iterator[Path]:
    """The path of an empty file to fill, which becomes `path` when the block ends well.

    streams: whoever fills it writes from front to end, so that pipes and devices can be given as they are.
    """
    if is_stdout(path):
        with tempfile.TemporaryDirectory(prefix="fxnvtx-") as folder:
            place = Path(folder) / "output"
            place.touch()
            yield place
            with _stdout_errors(), open(place, "rb") as file:
                sys.stdout.flush()
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.buffer.flush()
        return
    check_target(path, inputs)
    with _errors(path):
        found = _stat(path)
        if found is not None and not stat.S_ISREG(found.st_mode):
            if streams:
                yield Path(path)
                return
            with _elsewhere(Path(path)) as place:
                yield place
            return
        target = Path(os.path.realpath(path))  # a link stays one: what it points to is written
        partial = _partial(target, found)
        if partial is None:  # the file may be written, its folder not
            with _elsewhere(target) as place:
                yield place
            return
        try:
            yield partial
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: PathLike, text: str, inputs: Iterable[PathLike] = ()) -> Path:
    """Write a whole text; returns the path. Raises OutputError."""
    with writing(path, inputs) as file:
        file.write(text)
    return Path(path)


def write_bytes(path: PathLike, data: bytes) -> Path:
    """Write whole bytes; returns the path. Raises OutputError."""
    with writing_file(path, streams=True) as place, _errors(path), open(place, "wb") as file:
        file.write(data)
    return Path(path)


def check_target(path: PathLike | None, inputs: Iterable[PathLike] = ()) -> None:
    """Raise OutputError where `path` cannot be written to, before hours go into what would be."""
    if path is None or is_stdout(path):
        return
    if not os.fspath(path):
        raise OutputError("cannot write to a file without a name")
    with _errors(path):
        found = _stat(path)
        if found is None:
            folder = Path(os.path.realpath(path)).parent
            if not folder.is_dir():
                raise OutputError(f"cannot write {path}: {folder} is no folder")
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OutputError(f"cannot write {path}: no permission to write in {folder}")
            if str(os.fspath(path)).endswith(os.sep):
                raise OutputError(f"cannot write {path}: it names a folder")
        elif stat.S_ISDIR(found.st_mode):
            raise OutputError(f"cannot write {path}: it is a folder, name a file in it")
        elif not os.access(path, os.W_OK):
            raise OutputError(f"cannot write {path}: it may not be written (read-only)")
        mine = None if found is None else (found.st_dev, found.st_ino)
        real = os.path.realpath(path)
        for source in inputs:
            for ending in _SIDE_FILES:
                beside = f"{os.fspath(source)}{ending}"
                known = _stat(beside)
                # by name, too: a journal that is not there yet would be taken for one of the capture
                if os.path.realpath(beside) == real or (
                    mine is not None and known is not None and mine == (known.st_dev, known.st_ino)
                ):
                    raise OutputError(f"{path} is what is being read ({source}): name another file")


def is_stdout(path: PathLike) -> bool:
    return os.fspath(path) == STDOUT


def say(text: str, end: str = "\n") -> None:
    """A line on stdout. Raises OutputError where it cannot be written, such as on a full disk."""
    with writing(STDOUT) as file:
        file.write(printable_lines(text) + end)


def complain(text: str) -> None:
    """A line on stderr; a stderr that is closed or full has nobody to complain to."""
    try:
        _Encodable(sys.stderr).write(printable_lines(text) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def wrote(path: PathLike) -> None:
    """Tell on stderr that a file was written and how large it is."""
    if is_stdout(path):
        return
    found = _stat(path)
    size = f" ({found.st_size:,} bytes)" if found is not None and stat.S_ISREG(found.st_mode) else ""
    complain(f"wrote {path}{size}")


class _Encodable:
    """A stream that shows what its encoding has no character for as an escape instead of failing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)


def _stat(path: PathLike) -> os.stat_result | None:
    """What is there, links followed; None where nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _partial(target: Path, found: os.stat_result | None) -> Path | None:
    """A new empty file beside the target, with its mode and owner; None where its folder takes none."""
    partial = target.with_name(f".fxnvtx-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        # exclusively: never through a link that somebody put there
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if found is None:
            raise
        return None
    try:
        if found is not None:
            made = os.fstat(number)
            if (made.st_uid, made.st_gid) != (found.st_uid, found.st_gid):
                try:
                    os.fchown(number, found.st_uid, found.st_gid)
                except PermissionError:  # only root gives files away
                    pass
            os.fchmod(number, stat.S_IMODE(found.st_mode))
    finally:
        os.close(number)
    return partial


@contextmanager
def _elsewhere(target: Path) -> Iterator[Path]:
    """A file in the temporary folder, copied into the target as it stands when the block ends well."""
    with tempfile.TemporaryDirectory(prefix="fxnvtx-") as folder:
        place = Path(folder) / "output"
        place.touch()
        yield place
        with open(place, "rb") as file, open(target, "wb") as into:
            shutil.copyfileobj(file, into)


@contextmanager
def _errors(path: PathLike) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):
            raise  # not about the path
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}") from error


@contextmanager
def _stdout_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        _let_go_of_stdout()
        raise
    except OutputError:
        raise
    except OSError as error:
        _let_go_of_stdout()
        raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error


def _let_go_of_stdout() -> None:
    """Python writes what is left in stdout's buffer once more at its end, and would complain once more."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return
    if number == 1 and sys.stdout is sys.__stdout__:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
