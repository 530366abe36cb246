"""Writing never destroys: whatever the target is, it is written, or kept as it was with one clear error."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fxnvtx.cli import cli
from fxnvtx.errors import OutputError
from fxnvtx.output import check_target, write_bytes, write_text, writing, writing_file
from fxnvtx.recording import Range
from fxnvtx.report import load

from .samples import pipeline, recorded

FULL = Path("/dev/full")


def whole(folder: Path) -> dict[str, tuple[int, bytes | str | None]]:
    """Everything in a folder: mode, and content of files, target of links."""
    found: dict[str, tuple[int, bytes | str | None]] = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[str(path.relative_to(folder))] = (mode, content)
    return found


def drained(path: Path, write: Callable[[], object]) -> bytes:
    """What comes out of a FIFO while `write` runs."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    write()
    reader.join()
    return found[0]


def half_text(path: Path, error: type[BaseException]) -> None:
    with writing(path) as file:
        file.write("half")
        raise error


def half_bytes(path: Path, error: type[BaseException]) -> None:
    with writing_file(path) as place:
        place.write_bytes(b"half")
        raise error


names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=40).filter(
    lambda name: name not in (".", "..", "-") and len(name.encode()) < 250
)


@settings(max_examples=60, deadline=None)
@given(
    names,
    st.binary(max_size=20),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.integers(0, 3),
    st.sampled_from([0o600, 0o644, 0o755, 0o4750, 0o222]),
    st.booleans(),
)
def test_files_and_links(name: str, before: bytes, text: str, links: int, mode: int, exists: bool) -> None:
    """Any name, through a chain of links of any length, there already or not: links stay links, the mode stays."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "far").mkdir()
        target = folder / "far" / name
        if exists:
            target.write_bytes(before)
            target.chmod(mode)
        path = target
        for number in range(links):
            link = folder / f"link{number}"
            link.symlink_to(path if number % 2 else os.path.relpath(path, folder))
            path = link
        assert write_text(path, text) == path
        assert target.read_bytes() == text.encode()
        if exists:
            assert stat.S_IMODE(target.lstat().st_mode) == mode
        else:
            mask = os.umask(0)
            os.umask(mask)
            assert stat.S_IMODE(target.lstat().st_mode) == 0o666 & ~mask
        assert all((folder / f"link{number}").is_symlink() for number in range(links))
        assert len(list((folder / "far").iterdir())) == 1, "nothing else is left behind"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.binary(max_size=20), st.booleans())
def test_a_block_that_fails_leaves_everything_as_it_was(links: int, before: bytes, exists: bool) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = target = folder / "file"
        if exists:
            target.write_bytes(before)
        for number in range(links):
            (folder / f"link{number}").symlink_to(path)
            path = folder / f"link{number}"
        was = whole(folder)
        for error in (KeyboardInterrupt, ZeroDivisionError):
            with pytest.raises(error):
                half_text(path, error)
            with pytest.raises(error):
                half_bytes(path, error)
        assert whole(folder) == was


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    (tmp_path / "link").symlink_to(path)
    assert drained(path, lambda: write_text(path, "through")) == b"through"
    assert drained(path, lambda: write_bytes(tmp_path / "link", b"the link")) == b"the link"

    def seekable() -> None:
        with writing_file(path) as place, open(place, "r+b") as file:
            file.write(b"xx")
            file.seek(0)
            file.write(b"a")

    assert drained(path, seekable) == b"ax"
    assert stat.S_ISFIFO(path.lstat().st_mode)


@pytest.mark.parametrize("minor", [3, 7], ids=["null", "full"])
def test_a_device_is_written_to(tmp_path: Path, minor: int) -> None:
    path = tmp_path / "device"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        os.close(os.open(path, os.O_WRONLY))
    except PermissionError:  # not root, or a file system without devices: the system's own, which is never replaced
        path = Path("/dev/null" if minor == 3 else "/dev/full")
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        for write in (lambda name=name: write_text(name, "x"), lambda name=name: write_bytes(name, b"x")):
            if minor == 3:
                write()
            else:
                with pytest.raises(OutputError, match="No space left on device") as caught:
                    write()
                assert "\n" not in str(caught.value)
        with writing_file(name) as place:
            pass
        assert place != name
    assert stat.S_ISCHR(path.lstat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    was = whole(tmp_path)
    for target in (
        tmp_path / "folder", tmp_path / "none" / "x", tmp_path / "loop", tmp_path / "file" / "x",
        f"{tmp_path}/new/", tmp_path / ("x" * 300), tmp_path / "nul\0", ".", "",
    ):  # fmt: skip
        for write in (lambda t=target: write_text(t, "x"), lambda t=target: check_target(t)):
            with pytest.raises(OutputError) as caught:
                write()
            assert "\n" not in str(caught.value)
    assert whole(tmp_path) == was


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    path.chmod(0o444)
    if os.getuid() == 0:  # root may write everything, so the system's answer is given by hand
        monkeypatch.setattr(os, "access", lambda name, how: how != os.W_OK)
    with pytest.raises(OutputError, match="read-only"):
        write_text(path, "y")
    assert path.read_text() == "x"


def test_a_file_in_a_folder_that_takes_none_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's answer is given by hand."""
    path = tmp_path / "file"
    path.write_text("something longer")
    number = path.stat().st_ino
    real = os.open

    def refused(name: str | os.PathLike[str], flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_EXCL and Path(name).parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_ino == number
    with pytest.raises(OutputError):
        write_text(tmp_path / "other", "new")


# ------------------------------------------------------------------------------------------------ the commands


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A capture and a recording, each under every name that it can be reached by."""
    pipeline(tmp_path / "a.sqlite", requests=1, steps=1, blocks=1).close()
    recorded([Range("m", "module", None, 1, 0, 0, 10)]).save(tmp_path / "b.json")
    for name in ("a.sqlite", "b.json"):
        (tmp_path / f"link-{name}").symlink_to(tmp_path / name)
        os.link(tmp_path / name, tmp_path / f"hard-{name}")
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], env={"COLUMNS": "100"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("form", ["text", "json", "csv", "html", "chrome", "speedscope", "scrub"])
@pytest.mark.parametrize("name", ["a.sqlite", "b.json"])
def test_no_command_writes_onto_what_it_reads(folder: Path, form: str, name: str) -> None:
    was = whole(folder)
    how = ["--scrub"] if form == "scrub" else ["--format", form]
    for target in (name, f"link-{name}", f"hard-{name}", f"./../{folder.name}/{name}", f"{name}-wal"):
        code, said = run("report", folder / name, *how, "-o", f"{folder}/{target}")
        assert (code, said.count("\n")) == (1, 1), said
        assert "is what is being read" in said
        assert whole(folder) == was


def test_neither_side_of_a_comparison_nor_the_classes_are_written(folder: Path) -> None:
    was = whole(folder)
    a, b = folder / "a.sqlite", folder / "b.json"
    for target in (a, b, folder / "link-a.sqlite", folder / "hard-b.json"):
        assert run("diff", a, b, "-o", target)[0] == 1
    assert run("report", a, "--by", "class", "--classes", b, "-o", b)[0] == 1
    assert whole(folder) == was


def test_the_ending_says_the_format(folder: Path) -> None:
    wanted = {
        "x.json": "fxnvtx-report", "x.csv": "path,name", "x.html": "<!DOCTYPE html", "x.txt": "range", "x": "range",
        "x.trace.json": "traceEvents", "x.speedscope.json": "speedscope.app", "X.JSON": "fxnvtx-report",
    }  # fmt: skip
    for name, says in wanted.items():
        assert run("report", folder / "b.json", "-o", folder / name)[0] == 0
        assert says.lower() in (folder / name).read_text().lower()[:400], name
    assert run("diff", folder / "a.sqlite", folder / "b.json", "-o", folder / "d.json")[0] == 0
    assert json.loads((folder / "d.json").read_text())["format"] == "fxnvtx-diff"
    assert run("report", folder / "b.json", "--format", "csv", "-o", folder / "y.json")[0] == 0
    assert (folder / "y.json").read_text().startswith("path,name")


@pytest.mark.parametrize("form", ["text", "json", "csv", "html", "chrome", "speedscope", "scrub"])
def test_a_dash_is_stdout(folder: Path, form: str) -> None:
    how = ["--scrub"] if form == "scrub" else ["--format", form]
    source = folder / "a.sqlite"
    run("report", source, *how, "-o", folder / "out")
    command = [sys.executable, "-m", "fxnvtx", "report", str(source), *how, "-o", "-"]
    done = subprocess.run(command, capture_output=True, cwd=folder, env={**os.environ, "COLUMNS": "100"})
    assert (done.returncode, done.stderr) == (0, b"")
    if form == "scrub":
        (folder / "piped").write_bytes(done.stdout)
        assert load(folder / "piped").rows() == load(folder / "out").rows()
    else:
        assert done.stdout == (folder / "out").read_bytes()
    assert not (folder / "-").exists()


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", [[], ["-o", "-"], ["--format", "chrome", "-o", "-"], ["-o", "/dev/full"]])
def test_a_full_disk_is_one_clear_error(folder: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "fxnvtx", "report", "b.json", *arguments]
    with open(FULL, "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "No space left on device" in done.stderr


def test_a_reader_that_leaves_ends_it_quietly(folder: Path) -> None:
    command = f"{sys.executable} -m fxnvtx report a.sqlite --format chrome -o - | head -c 1 > /dev/null"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)
    assert done.stderr == ""


def test_a_terminal_without_our_letters_gets_escapes(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    command = [sys.executable, "-m", "fxnvtx", "report", "a.sqlite"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u2026" in done.stdout
