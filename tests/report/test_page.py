"""The HTML page in a real headless Chromium: zoom, search, sort, theme, keyboard; and it never asks the network."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fxnvtx.cli import cli
from fxnvtx.recording import Range
from fxnvtx.report import Report, from_recording, load, render_html, render_text
from fxnvtx.report.findings import findings
from fxnvtx.report.labels import Name, role_of
from fxnvtx.report.part import Window
from fxnvtx.report.work import parse_peaks

from .browser import Browser, find_chromium
from .captures import Capture
from .samples import pipeline, recorded
from .test_roof import entry, layers

needs_browser = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on the PATH")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    path = folder / "report.html"
    path.write_text(render_html(load(pipeline(folder / "pipeline.sqlite").close())), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    browser = Browser()
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def browser(running: Browser, page: Path) -> Iterator[Browser]:
    running.requests.clear()
    running.errors.clear()
    running.theme("light")
    running.open(page)
    running.run("localStorage.clear()")
    yield running
    assert running.errors == []
    outside = [url for url in running.requests if not url.startswith(("file://", "data:"))]
    assert outside == []


def settled(browser: Browser) -> None:
    """Until a zoom has come to its end."""
    browser.wait("!fxnvtx.icicle.moving")


def node(browser: Browser, name: str) -> int:
    return int(browser.run(f"fxnvtx.tree.name.findIndex((n) => fxnvtx.data.names[n] === {json.dumps(name)})"))


def center(browser: Browser, index: int) -> tuple[float, float]:
    browser.run("document.getElementById('icicle').scrollIntoView({block: 'center'})")
    x, y = browser.run(
        f"(() => {{ const r = fxnvtx.icicle.rectOf({index});"
        " const c = document.getElementById('icicle').getBoundingClientRect();"
        " return [c.x + r.x + r.width / 2, c.y + r.y + r.height / 2]; })()"
    )
    return x, y


@needs_browser
def test_click_zooms_and_escape_zooms_out(browser: Browser) -> None:
    step = node(browser, "denoising_step_1_t999")
    before = browser.run(f"fxnvtx.icicle.rectOf({step}).width")
    browser.click(*center(browser, step))
    settled(browser)
    assert browser.run("fxnvtx.model.root") == step
    width = browser.run("document.getElementById('icicle').clientWidth")
    assert browser.run(f"fxnvtx.icicle.rectOf({step}).width") == pytest.approx(width, abs=1)
    assert before < width / 4
    crumbs = browser.run("[...document.querySelectorAll('#crumbs button')].map((b) => b.textContent)")
    assert crumbs == ["everything", "request#0", "denoising_step_1_t999"]
    browser.run("document.getElementById('icicle').focus()")
    browser.key("Escape")
    assert browser.run("fxnvtx.nameOf(fxnvtx.model.root)") == "request#0"
    browser.click_on("#crumbs button")
    assert browser.run("fxnvtx.model.root") == 0


@needs_browser
def test_keyboard_walks_the_icicle(browser: Browser) -> None:
    browser.run("document.getElementById('icicle').focus()")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight"):
        browser.key(key)
    assert browser.run("fxnvtx.nameOf(fxnvtx.model.at)").startswith("denoising_step_")
    browser.key("ArrowUp")
    assert browser.run("fxnvtx.nameOf(fxnvtx.model.at)").startswith("request#")
    assert "calls" in browser.run("document.getElementById('pointed').textContent")
    browser.key("Enter")
    assert browser.run("fxnvtx.nameOf(fxnvtx.model.root)").startswith("request#")


@needs_browser
def test_search_counts_and_filters(browser: Browser) -> None:
    browser.key("/", "/")
    assert browser.run("document.activeElement.id") == "search"
    browser.type("attn")
    browser.wait("document.getElementById('found').textContent !== ''")
    # 2 requests x 4 steps x 3 blocks, each with attn and fused(norm, attn): 24 * 36 us of 24 * 46 us and two copies of
    # 30 us
    said = browser.run("document.getElementById('found').textContent")
    assert said == "48 found, 74.2%"
    names = browser.run("[...document.querySelectorAll('#rows .row.hit')].map((r) => r.firstChild.textContent)")
    assert names
    assert all("attn" in name for name in names)
    assert not browser.run("[...document.querySelectorAll('#rows .row')].some((r) => r.textContent.includes('.norm'))")
    browser.key("Escape")
    assert browser.run("document.getElementById('found').textContent") == ""
    assert browser.run("fxnvtx.model.hits") is None


@needs_browser
def test_sorting_by_click_and_keyboard(browser: Browser) -> None:
    browser.click_on("#views [data-key='module']")
    browser.click_on("[data-sort='cpu']")
    column = (
        "(() => { const cpu = new Map(fxnvtx.data.views.module.rows.map((r) => [r.name, r.cpu]));"
        " return [...document.querySelectorAll('#rows .row')].map((r) => cpu.get(r.firstChild.textContent)); })()"
    )
    values = browser.run(column)
    assert len(set(values)) > 2
    assert values == sorted(values, reverse=True)
    assert browser.run("document.querySelector('[data-sort=cpu]').parentElement.ariaSort") == "descending"
    browser.click_on("[data-sort='cpu']")
    values = browser.run(column)
    assert values == sorted(values)
    browser.run("document.querySelector('[data-sort=name]').focus()")
    browser.key("Enter", "\r")
    names = browser.run("[...document.querySelectorAll('#rows .row')].map((r) => r.firstChild.textContent)")
    assert names == sorted(names)
    assert len(names) == 11


@needs_browser
def test_tree_rows_fold_by_keyboard(browser: Browser) -> None:
    before = browser.run("fxnvtx.table.size")
    browser.run("document.getElementById('table').focus()")
    browser.key("ArrowDown")
    browser.key("ArrowLeft")
    assert browser.run("fxnvtx.table.size") < before
    browser.key("ArrowRight")
    assert browser.run("fxnvtx.table.size") == before


@needs_browser
def test_themes_and_their_contrast(browser: Browser) -> None:
    seen = []
    for _ in range(2):
        seen.append(browser.run("document.documentElement.dataset.theme"))
        for category in ("request", "step", "module", "residency", "unknown", "kernel"):
            ink, fill = browser.run(f"[themeNow().ink, fillOf({json.dumps(category)})]")
            assert contrast(ink, fill) >= 4.5, (seen[-1], category)
        page = browser.run(
            "['--ink', '--dim', '--page', '--panel'].map((n) =>"
            " getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
        )
        assert contrast(page[0], page[2]) >= 7
        assert contrast(page[1], page[3]) >= 4.5
        browser.click_on("#theme")
    assert seen == ["light", "dark"]
    assert browser.run("document.documentElement.dataset.theme") == "light"
    assert browser.run("localStorage.getItem('fxnvtx-theme')") == "light"


@needs_browser
def test_the_system_theme_is_followed(browser: Browser, page: Path) -> None:
    browser.theme("dark")
    browser.open(page)
    assert browser.run("document.documentElement.dataset.theme") == "dark"


def contrast(one: str, two: str) -> float:
    """WCAG's contrast ratio."""

    def light(color: str) -> float:
        color = color.lstrip("#")
        parts = [int(color[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(one), light(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_measure_and_step_chart(browser: Browser) -> None:
    said = "document.getElementById('steps-said').textContent"
    assert browser.run(said) == "8 steps, min 138.0 µs, median 138.0 µs (dashed), max 138.0 µs"
    browser.click_on("#measures [data-key='cpu']")
    assert "138.0" not in browser.run(said)
    place = browser.run(
        "(() => { const c = document.getElementById('steps'); c.scrollIntoView({block: 'center'});"
        " const r = c.getBoundingClientRect(); return [r.x + 70 + (r.width - 82) * 2.5 / 8, r.y + 60]; })()"
    )
    browser.click(*place)
    settled(browser)
    assert browser.run("fxnvtx.nameOf(fxnvtx.model.root)") == "denoising_step_2_t998"


@needs_browser
def test_a_hundred_thousand_rows_stay_usable(browser: Browser, tmp_path: Path) -> None:
    ranges: list[Range] = []
    now = 0
    for step in range(100):
        begin = now
        place = len(ranges)
        for block in range(999):
            ranges.append(Range(f"net.blocks.{block}.layer", "module", None, 1, 1, now, now + 50 + block % 7))
            now += 60
        ranges.insert(place, Range(f"denoising_step_{step}_t{step}", "step", None, 1, 0, begin, now))
        now += 10
    recording = recorded(ranges)
    path = tmp_path / "big.html"
    path.write_text(render_html(from_recording(recording)), encoding="utf-8")
    start = time.monotonic()
    browser.open(path)
    opened = time.monotonic() - start
    assert browser.run("fxnvtx.tree.parent.length") == 100_001
    # the first picture: what the window can show, not what the file holds
    settled(browser)
    assert 0 < browser.run("fxnvtx.icicle.drawn") < 10_000
    assert browser.run("document.querySelectorAll('#rows .row').length") < 100
    took = browser.run(
        "(() => { const t = performance.now(); document.getElementById('search').value = 'blocks.99';"
        " search('blocks.99'); fxnvtx.table.rebuild(); return performance.now() - t; })()"
    )
    drawing = browser.run(
        "(async () => { const t = performance.now(); for (let i = 0; i < 10; i++) { fxnvtx.icicle.refresh();"
        " await new Promise(requestAnimationFrame); } return (performance.now() - t) / 10; })()"
    )
    scrolling = browser.run(
        "(async () => { const box = document.getElementById('table'); const t = performance.now();"
        " for (let i = 0; i < 20; i++) { box.scrollTop = i * 9000; await new Promise(requestAnimationFrame); }"
        " return (performance.now() - t) / 20; })()"
    )
    # generous: what matters is that no step takes time per row
    assert opened < 20
    assert took < 1500
    assert drawing < 250
    assert scrolling < 250


@needs_browser
def test_names_cannot_break_out_of_the_page(browser: Browser, tmp_path: Path) -> None:
    capture = Capture(tmp_path / "evil.sqlite")
    evil = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'> __SCRIPT__ <!--"
    capture.range(0, 10, evil)
    path = tmp_path / "evil.html"
    path.write_text(render_html(load(capture.close())), encoding="utf-8")
    browser.open(path)
    assert browser.run("fxnvtx.nameOf(1)") == evil
    assert browser.run("window.broken === undefined")
    assert browser.run("document.querySelector('#rows .row').firstChild.title") == evil


@needs_browser
def test_a_capture_without_anything_opens(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "zero.html"
    path.write_text(render_html(load(Capture(tmp_path / "zero.sqlite").close())), encoding="utf-8")
    browser.open(path)
    assert "holds no push/pop range" in browser.run("document.getElementById('notes').textContent")


def test_the_page_is_one_file_that_refers_to_nothing(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)", text)
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    parents = data["tree"]["parent"]
    assert all(parent < index for index, parent in enumerate(parents) if index), "a parent stands before its children"
    assert {len(column) for column in data["tree"].values()} == {len(parents)}


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A page with a bit of everything."""
    folder = tmp_path_factory.mktemp("rich")
    capture = pipeline(folder / "rich.sqlite")
    capture.kernel(2_000_000, 2_040_000, capture.call(1_100_000, 1_101_000), "ncclDevKernel_AllReduce", stream=9)
    capture.call(1_150_000, 1_190_000, name="cudaStreamSynchronize_v3020")
    capture.memory(1_120_000, capture.call(1_120_000, 1_120_500, name="cudaMalloc_v3020"), 50 << 20)
    report = load(capture.close(), window=Window(compiling=True, timeline=True))
    report.classes.update({"transformer": "FluxTransformer", "transformer.blocks.0.attn": "Attention"})
    path = folder / "rich.html"
    path.write_text(render_html(report), encoding="utf-8")
    return path, report


@needs_browser
def test_the_legend_tells_what_the_colours_are(browser: Browser, rich: tuple[Path, Report]) -> None:
    browser.open(rich[0])
    legend = browser.run("[...document.querySelectorAll('#legend li')].map((li) => li.textContent)")
    assert legend == ["request", "step", "block", "module", "attention", "norm", "fused", "residency"]
    for theme in ("light", "dark"):
        colors = browser.run(f"Object.entries(palette.{theme}).filter(([n]) => n in roleText).map(([, c]) => c)")
        assert len({*colors}) == len(colors), "no two share a colour"
    shown = browser.run(
        "fillOf(roleOf(fxnvtx.tree.name.findIndex((n) => fxnvtx.data.names[n].endsWith('blocks.1.attn'))))"
    )
    assert shown in browser.run("Object.values(palette).map((p) => p.attention)")
    for text, kind, role in (
        ("blocks.3", "", "block"), ("blocks.3.attn.to_q", "", "attention"), ("blocks.3.attn.norm_q", "", "norm"),
        ("layers.0.mlp.gate_proj", "", "mlp"), ("net.2", "FeedForward", "mlp"), ("vae.decoder", "", "module"),
        ("fused(norm1, attn.to_q)", "", "fused"), ("blocks.3.norm2", "", "norm"),
        ("attn_blocks.0", "", "block"),
    ):  # fmt: skip
        assert role_of(Name(text, "module"), kind) == role, text


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers at 90, 40 and 10 % of the roof, one above it, one without registered work."""
    folder = tmp_path_factory.mktemp("rated")
    shares = {"net.a": 90, "net.b": 40, "net.c": 10, "net.d": 150}
    entries = [entry(label, bf16=share * 10**6) for label, share in shares.items()]
    times = {label: [100_000] for label in [*shares, "net.e"]}
    report = load(layers(folder / "rated.sqlite", [*entries, entry("net")], times), peak=parse_peaks("bf16=1000G"))
    path = folder / "rated.html"
    path.write_text(render_html(report), encoding="utf-8")
    return path


@needs_browser
def test_headroom_as_colour(browser: Browser, rated: Path) -> None:
    browser.open(rated)
    legend = "[...document.querySelectorAll('#legend li')].map((li) => li.textContent)"
    kinds = browser.run(legend)
    assert kinds == ["module"]
    browser.click_on("#colors [data-key='headroom']")
    settled(browser)
    assert browser.run(legend) == [
        "80 % of the roof or more", "50 to 80 %", "20 to 50 %", "under 20 %", "above the roof: suspect",
        "work or peak not known",
    ]  # fmt: skip
    bands = {"net.a": "near", "net.b": "far", "net.c": "farthest", "net.d": "above", "net.e": "unrated", "net": "half"}
    for theme in ("light", "dark"):
        assert browser.run("document.documentElement.dataset.theme") == theme
        shown = {name: painted_color(browser, node(browser, name)) for name in bands}
        assert shown == {name: browser.run(f"themeNow()[{json.dumps(band)}]") for name, band in bands.items()}
        assert len({*shown.values()}) == len(bands)
        for name, color in shown.items():
            assert contrast(browser.run("themeNow().ink"), color) >= 4.5, (theme, name)
        browser.click_on("#theme")
        settled(browser)
    browser.hover(*center(browser, node(browser, "net.b")))
    said = browser.run("document.getElementById('tip').textContent")
    assert "headroom 60.00 µs" in said
    assert "40.0% of the roof, compute-bound" in said
    browser.click_on("#colors [data-key='role']")
    assert browser.run(legend) == kinds


@needs_browser
def test_without_work_there_is_nothing_to_choose(browser: Browser, rich: tuple[Path, Report]) -> None:
    browser.open(rich[0])
    assert browser.run("document.getElementById('colors').children.length") == 0


def painted_color(browser: Browser, index: int) -> str:
    """The fill of a box in the picture."""
    return str(
        browser.run(
            f"(() => {{ const r = fxnvtx.icicle.rectOf({index}), d = window.devicePixelRatio || 1;"
            " const copy = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });"
            " copy.drawImage(document.getElementById('icicle'), -(r.x + 3) * d, -(r.y + 3) * d);"
            " return '#' + [...copy.getImageData(0, 0, 1, 1).data].slice(0, 3)"
            ".map((v) => v.toString(16).padStart(2, '0')).join(''); })()"
        )
    )


@needs_browser
def test_a_fused_box_is_explained_on_hover(browser: Browser, rich: tuple[Path, Report]) -> None:
    browser.open(rich[0])
    fused = next(i for i, text in enumerate(browser.run("fxnvtx.data.names")) if text.startswith("fused("))
    index = browser.run(f"fxnvtx.tree.name.findIndex((n) => n === {fused})")
    browser.run(f"fxnvtx.icicle.zoom(fxnvtx.tree.parent[{index}])")
    settled(browser)
    x, y = center(browser, index)
    browser.hover(x, y)
    text = browser.run("document.getElementById('tip').textContent")
    assert "the compiler made one kernel of" in text
    assert " and " in text
    assert not browser.run("document.getElementById('tip').hidden")


@needs_browser
def test_findings_come_first(browser: Browser, rich: tuple[Path, Report]) -> None:
    path, report = rich
    browser.open(path)
    said = browser.run("[...document.querySelectorAll('#findings > li > span')].map((e) => e.textContent)")
    found, silent = findings(report)
    assert said == [finding.text for finding in found]
    assert said
    assert browser.run("document.querySelectorAll('#unsaid-list li').length") == len(silent)
    above = "document.getElementById('advice').compareDocumentPosition(document.getElementById('icicle')) & 4"
    assert browser.run(above) == 4


@needs_browser
def test_columns_are_named_as_in_text(browser: Browser, rich: tuple[Path, Report]) -> None:
    path, report = rich
    browser.open(path)
    shown = browser.run("[...document.querySelectorAll('#head button')].map((e) => e.textContent)")
    text = render_text(report, width=400).splitlines()[0]
    for name in shown:
        assert name == "class" or f" {name} " in f" {text} ", name
    assert {"hidden", "bytes", "exposed", "wait", "queue", "memory", "class"} <= {*shown}
    row = browser.run(
        "[...document.querySelectorAll('.row')].find((r) => r.textContent.includes('residency')).textContent"
    )
    assert "1.0 MiB" in row
    browser.run("document.querySelector('#views [data-key=step]').click()")
    steps = browser.run("[...document.querySelectorAll('#head button')].map((e) => e.textContent)")
    assert {"total", "self", "gpu", "gap", "share"} <= {*steps}


@needs_browser
def test_a_step_as_it_ran(browser: Browser, rich: tuple[Path, Report]) -> None:
    path, report = rich
    browser.open(path)
    kept = report.parts[0].timeline
    assert kept is not None
    assert kept.title.startswith("denoising_step_")
    assert len(kept.work) == 9
    assert {name.text.partition("transformer.blocks.")[2] for *_rest, name in kept.spans} >= {"0.attn", "2.norm"}
    lanes = browser.run("fxnvtx.data.timeline.lanes")
    assert lanes == ["thread 1", "GPU 0, stream 7"]
    every = browser.run("fxnvtx.timeline.drawn")
    assert every == len(kept.spans) + len(kept.work)
    browser.run("document.getElementById('timeline').focus()")
    browser.key("+")
    start, end = browser.run("fxnvtx.timeline.view")
    assert end - start < browser.run("Math.max(...fxnvtx.data.timeline.boxes.map((b) => b[3]))")
    browser.key("Escape")
    assert browser.run("fxnvtx.timeline.drawn") == every


@needs_browser
def test_what_it_looks_like(browser: Browser, rich: tuple[Path, Report], tmp_path: Path) -> None:
    """Pictures at three widths, dark and light, are left for people (FXNVTX_PICTURES names a folder that stays)."""
    folder = Path(os.environ.get("FXNVTX_PICTURES") or tmp_path)
    folder.mkdir(exist_ok=True)
    try:
        for width in (390, 1440, 2560):
            browser.resize(width)
            for theme in ("light", "dark"):
                browser.theme(theme)
                browser.open(rich[0])
                settled(browser)
                browser.screenshot(folder / f"report-{width}-{theme}.png")
                assert browser.run("document.documentElement.scrollWidth") <= width, "nothing sticks out"
                assert browser.run("document.documentElement.dataset.theme") == theme
                for canvas in ("icicle", "timeline", "steps"):
                    assert browser.run(
                        f"(() => {{ const c = document.getElementById('{canvas}');"
                        " const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
                        " return new Set(new Uint32Array(p.buffer)).size; })()"
                    ) > 3, f"the {canvas} is painted"  # fmt: skip
        assert len(list(folder.glob("report-*.png"))) == 6
    finally:
        browser.resize(1400)


@needs_browser
def test_two_captures_side_by_side(browser: Browser, tmp_path: Path) -> None:
    """One scale for both, colours by how a call changed, one zoom for both sides."""
    slow, fast = pipeline(tmp_path / "a.sqlite").close(), pipeline(tmp_path / "b.sqlite", scale=0.5, steps=2).close()
    path = tmp_path / "diff.html"
    done = CliRunner().invoke(cli, ["diff", str(slow), str(fast), "-o", str(path)])
    assert done.exit_code == 0, done.output
    browser.open(path)
    assert "faster" in browser.run("document.getElementById('headline').textContent")
    pixels = browser.run("fxnvtx.sides.map((s) => s.drawn[0][1] - s.drawn[0][0])")
    assert pixels[1] < pixels[0] / 2, "half the steps, each half as long"
    attn = browser.run(
        "[...fxnvtx.sides[0].keys.keys()].find((k) => fxnvtx.data.names[k.split('\\0').pop()].endsWith('.attn'))"
    )
    assert browser.run(f"fxnvtx.kindOf({json.dumps(attn)})") == "faster"
    assert browser.run(f"fxnvtx.change({json.dumps(attn)})") == -0.5
    browser.run(f"fxnvtx.zoom({json.dumps(attn)})")
    names = browser.run("fxnvtx.sides.map((s) => fxnvtx.data.names[s.tree.name[s.drawn[0][3]]])")
    assert names == ["transformer.blocks.*.attn"] * 2
    assert browser.run("document.querySelectorAll('#changes tbody tr').length") > 5
    browser.run("fxnvtx.zoom('')")
    folder = Path(os.environ.get("FXNVTX_PICTURES") or tmp_path)
    try:
        for width, theme in ((390, "dark"), (1440, "light"), (2560, "dark")):
            browser.resize(width)
            browser.theme(theme)
            browser.open(path)
            browser.screenshot(folder / f"diff-{width}-{theme}.png")
            assert browser.run("document.documentElement.scrollWidth") <= width
    finally:
        browser.resize(1400)
        browser.theme("light")
    done = CliRunner().invoke(cli, ["diff", str(slow), str(fast), "--format", "html"])
    assert done.exit_code == 2
