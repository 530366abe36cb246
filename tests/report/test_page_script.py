"""The page's functions that need no page, run by node: the same figures as the text has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fxnvtx
from fxnvtx.categories import CATEGORIES, PIECE
from fxnvtx.report.render import readable_bytes, readable_ns, readable_share
from fxnvtx.report.render.data import _SCRIPTS as SCRIPTS

PAGE = Path(fxnvtx.__file__).parent / "report" / "page"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node on the PATH")


def told(expression: str) -> Any:
    """What a JavaScript expression over the functions of pure.js is, as JSON has it."""
    script = f"{(PAGE / 'pure.js').read_text(encoding='utf-8')}\nprocess.stdout.write(JSON.stringify({expression}))"
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


@needs_node
def test_numbers_read_as_in_the_text() -> None:
    times = [
        0,
        1,
        999,
        1000,
        1001,
        9994,
        99_994,
        99_996,
        999_949,
        999_951,
        12_345_678,
        999_949_000,
        10**9,
        86_400 * 10**9,
    ]
    assert told(f"{times}.map(time)") == [readable_ns(value).replace("us", "µs") for value in times]
    sizes = [0, 1, 1023, 1024, 1536, 10**6, 10**9, 5 * 10**12]
    assert told(f"{sizes}.map(bytes)") == [readable_bytes(value) for value in sizes]
    shares = [0, 0.001, 0.5, 1, 1.2345]
    assert told(f"{shares}.map(percent)") == [readable_share(value) for value in shares]
    assert told("[whole(0), whole(1234567)]") == ["0", "1,234,567"]


@needs_node
def test_places_fill_their_parents_and_never_more() -> None:
    # a root of 100 with children of 60 and 20; in the first one 50 and 30, which overlap and are scaled to fit
    found = told(
        "(({left, right}) => [[...left], [...right]])(placed([[1, 2], [3, 4], [], [], []], [100, 60, 20, 50, 30]))"
    )
    left, right = found
    assert (left[0], right[0]) == (0, 1)
    assert (left[1], right[1], left[2], right[2]) == pytest.approx((0, 0.6, 0.6, 0.8))
    assert (left[3], right[3], left[4], right[4]) == pytest.approx((0, 0.375, 0.375, 0.6))
    assert told("[...placed([[1], []], [0, 0]).right]") == [1, 0]


@needs_node
def test_bands_of_the_roof() -> None:
    shares = "[null, undefined, 0, 0.1999, 0.2, 0.5, 0.8, 1, 1.0001]"
    assert told(f"{shares}.map(bandOf)") == [
        "unrated", "unrated", "farthest", "farthest", "far", "half", "near", "near", "above",
    ]  # fmt: skip


@needs_node
def test_fused_ranges_are_explained() -> None:
    (said,) = told("explained('fused(norm1, attn.to_q)')")
    assert said.startswith("the compiler made one kernel of norm1 and attn.to_q;")
    assert told("explained('blocks.0.fused')") == []


# what a page's scripts say of each other is checked together; pure.js alone says all its types
@pytest.mark.skipif(shutil.which("tsc") is None, reason="no TypeScript on the PATH")
@pytest.mark.parametrize(
    ("files", "strictly"),
    [(("pure.js",), True), (SCRIPTS, False), (("diff.js",), False)],
    ids=["pure", "report", "diff"],
)
def test_types_of_the_scripts(files: tuple[str, ...], strictly: bool) -> None:
    command = ["tsc", "--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "es2022"]
    command += [] if strictly else ["--noImplicitAny", "false"]
    done = subprocess.run(
        [*command, *(str(PAGE / file) for file in files)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


def test_every_script_asks_editors_to_check_it() -> None:
    scripts = sorted(PAGE.glob("*.js"))
    assert {path.name for path in scripts} == {*SCRIPTS, "diff.js"}
    assert [path.name for path in scripts if not path.read_text(encoding="utf-8").startswith("// @ts-check\n")] == []


def test_every_category_has_a_colour_of_its_own_in_the_page() -> None:
    """What the page does not know would look like a module."""
    script = (PAGE / "model.js").read_text(encoding="utf-8")
    _, light, dark, texts = re.split(r"  light: \{|  dark: \{|const roleText = \{", script)
    for known in (light, dark, texts):
        assert CATEGORIES.keys() - {PIECE} <= set(re.findall(r'(\w+): "', known))
