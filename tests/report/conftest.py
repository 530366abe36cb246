"""What several tests of the report need."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ..support.limits import CHILD_S

Stats = Callable[[str, Path], list[dict[str, str]]]


@pytest.fixture(scope="session")
def nsys_stats() -> Stats:
    """`nsys stats -r REPORT FILE` as rows."""
    nsys = shutil.which("nsys")
    if nsys is None:
        pytest.skip("Nsight Systems is not on the PATH: its own statistics are the reference of this test")

    def run(report: str, path: Path) -> list[dict[str, str]]:
        done = subprocess.run(
            [nsys, "stats", "-q", "-r", report, "--format", "csv", "--output", "-", str(path)],
            capture_output=True,
            text=True,
            timeout=CHILD_S,
        )
        assert done.returncode == 0, done.stderr
        return list(csv.DictReader(io.StringIO(done.stdout)))

    return run
