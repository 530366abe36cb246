"""Every option in every mode: it changes what comes out, or it is refused. None is ignored in silence."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fxnvtx.cli import cli
from fxnvtx.cli.profile import kind_of, profile_command
from fxnvtx.recording import Entry, encoded
from fxnvtx.report.commands import DIFF_FORMATS, FORMATS, diff_command, report_command
from fxnvtx.report.rows import ORDERS
from fxnvtx.report.selection import VIEWS

from .captures import Capture
from .samples import pipeline, recorded

# a value of each option that makes a difference where the option has a meaning
GIVEN: dict[str, list[str]] = {
    "by": [], "form": [], "output": [], "scrubbed": [], "depth": ["--depth", "1"], "include": ["--include", "*.attn"],
    "exclude": ["--exclude", "*.attn"], "fold": ["--fold"], "kernels": ["--kernels"], "split_fused": ["--split-fused"],
    "sort": ["--sort", "ORDER"], "limit": ["--limit", "1"], "everything": ["--all"],
    "requests": ["--requests", "1"], "steps": ["--steps", "1"],
    "skip_warmup": ["--skip-warmup"], "skip_first": ["--skip-first", "2"],
    "between": ["--between", "0:1us"], "keep_compile": ["--keep-compile"], "exact": ["--exact"],
    "jobs": ["--jobs", "1"],
    "findings_": ["--findings"],
    "peak": ["--peak", "bf16=1T,mem=1T"],
    "classes": ["--classes", "CLASSES"],
}  # fmt: skip
SILENT = {"jobs"}  # changes the speed only
OTHER = {"fold": "--no-fold"}  # what to compare with: in text the tree is folded unless told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture in which every option makes a difference."""
    made = tmp_path_factory.mktemp("options")
    capture = pipeline(made / "a.sqlite", requests=3, steps=2, blocks=2)
    query = "SELECT start FROM NVTX_EVENTS JOIN StringIds ON id = textId WHERE value = 'request#1'"
    second = capture.database.execute(query).fetchone()[0] + 10
    capture.range(second, second + 500, "compile", "compile")  # in the second request
    last = 200_000_000
    capture.range(last, last + 100_000, "request#3", "request")
    capture.range(last + 1_000, last + 2_000, "stage_a", "stage")
    capture.range(last + 3_000, last + 4_000, "stage_b", "stage")
    capture.range(last + 10_000, last + 90_000, "denoising_step_0_t1000", "step")
    capture.range(last + 5_000, last + 6_000, "net.0")
    capture.range(last + 7_000, last + 8_000, "net.1")
    for number in range(2):
        at = last + 20_000 + number * 20_000
        capture.range(at, at + 9_000, f"aten::mm, op_id = {number}")
        capture.kernel(at + 5_000, at + 7_000, capture.call(at + 100, at + 200), "mm")
        capture.kernel(at + 15_000, at + 16_000, capture.call(at + 300, at + 400), "mm")
    for number in range(2):
        at = last + 200_000 + number * 1_000
        capture.range(at, at + 900, "request", "request", payload=number)
        capture.range(at + 100, at + 200, "step", "step", payload=0)
        capture.range(at + 300, at + 400, "step", "step", payload=1)
    for number in range(25):  # what --all shows
        at = last + 300_000 + number * 100
        capture.range(at, at + 90, f"request#{10 + number}", "request")
        capture.range(at + 1, at + 80, f"stage_{chr(97 + number)}s", "stage")
        capture.range(at + 2, at + 70, f"denoising_step_{number}_t{number}", "step")
        capture.range(at + 3, at + 60, f"small{chr(97 + number)}", "module")
        capture.kernel(at + 10, at + 12, capture.call(at + 5, at + 6), f"small_{number}")
    for label, flops in (("transformer", 10), ("aten::mm", 1), ("transformer.blocks.0.attn", 10**9)):
        capture.text(encoded(Entry(label, "", False, "forward", 1, (("bf16", flops),), 10**6, "", "cuda")))
    capture.close()
    classes = {f"small{chr(97 + number)}": f"Small{number}" for number in range(25)}
    classes |= {"transformer.blocks.0": "A", "transformer.blocks.1": "B", "transformer": "T"}
    recorded([], classes=classes).save(made / "classes.json")
    return made


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, list(arguments), env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def test_this_table_knows_every_option() -> None:
    options = {p.name for p in report_command.params if isinstance(p, click.Option)}
    assert options == set(GIVEN)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*(f"--format {form}" for form in FORMATS), "--scrub"])
@pytest.mark.parametrize("by", VIEWS)
def test_an_option_is_honoured_or_refused(folder: Path, mode: str, by: str) -> None:
    tables = mode.split()[-1] in ("text", "json", "csv")
    if not tables and by != "tree":
        code, said = run("report", str(folder / "a.sqlite"), *mode.split(), "--by", by, "-o", str(folder / "x"))
        assert code == 2, said
        return
    base = ["report", str(folder / "a.sqlite"), *mode.split(), *(["--by", by] if tables else [])]

    def outcome(*more: str) -> tuple[int, str]:
        target = folder / "out"
        target.unlink(missing_ok=True)
        code, said = run(*base, *more, "-o", str(target))
        return (code, target.read_bytes().decode("latin-1")) if code == 0 else (code, said)

    for name, words in GIVEN.items():
        if not words:
            continue
        words = [str(folder / "classes.json") if word == "CLASSES" else word for word in words]
        known = ["--classes", str(folder / "classes.json")] if by == "class" and name != "classes" and tables else []
        if name == "sort" and outcome("--sort", "calls")[0] == 0:  # one of the orders is not the one there is
            assert len({outcome("--sort", order, *known) for order in ORDERS}) > 1, (
                f"--sort is ignored with {mode} --by {by}"
            )
            continue
        code, shown = outcome(*known, *[word.replace("ORDER", "calls") for word in words])
        if code == 2:
            assert "has no meaning with" in shown, (name, shown)
            continue
        assert code == 0, (name, shown)
        plain = outcome(*known, *([OTHER[name]] if name in OTHER else []))[1]
        assert name in SILENT or shown != plain, f"{words} is ignored with {mode} --by {by}"


@pytest.mark.parametrize("form", DIFF_FORMATS)
def test_options_of_a_comparison(folder: Path, form: str) -> None:
    a = str(folder / "a.sqlite")
    for parameter in diff_command.params:
        words = {**GIVEN, "steps": ["--steps", "0"]}.get(str(parameter.name), [])
        if not isinstance(parameter, click.Option) or not words:
            continue
        target = ["-o", str(folder / "diff.html")] if form == "html" else []
        code, shown = run("diff", a, a, "--format", form, *words, *target)
        page = (folder / "diff.html").read_text() if target and not code else ""
        plain = run("diff", a, a, "--format", form, *target)[1]
        if page:
            shown, plain = page, (folder / "diff.html").read_text()
        assert (code == 2 and "has no meaning" in shown) or shown != plain, words


PROFILE = {
    "prompt": ["--prompt", "x"], "steps": ["--steps", "2"], "seed": ["--seed", "1"], "size": ["--size", "tiny"],
    "compile_": ["--compile"], "residency": ["--residency", "dit=snapshot-offload"], "depth": ["--depth", "1"],
    "stages_only": ["--stages-only"], "warmup": ["--warmup", "0"], "model": ["--model", "folder"],
}  # fmt: skip
HAS = {
    "built-in": set(PROFILE) - {"model"},
    "diffusers": set(PROFILE) - {"residency", "size"},
    "file": {"depth", "warmup"},
}


def test_the_table_of_profile_knows_every_option() -> None:
    options = {p.name for p in profile_command.params if isinstance(p, click.Option)}
    assert options == {*PROFILE, "pipeline", "nsys", "rows", "output"}


@pytest.mark.parametrize("pipeline", ["reference", "two-stage", "diffusers:None", "none.py:make"])
def test_options_of_profile(pipeline: str, tmp_path: Path) -> None:
    """The pipelines of the last two do not exist: what has a meaning gets as far as that."""
    for name, words in PROFILE.items():
        if name in HAS[kind_of(pipeline)]:
            continue
        code, said = run("profile", "--no-nsys", "--pipeline", pipeline, *words, "-o", str(tmp_path / "out"))
        assert code == 2
        assert f"has no meaning with --pipeline {pipeline}" in said
    assert not (tmp_path / "out").exists()
    if kind_of(pipeline) != "built-in":
        allowed = [word for name in sorted(HAS[kind_of(pipeline)] - {"model"}) for word in PROFILE[name]]
        code, said = run("profile", "--no-nsys", "--pipeline", pipeline, *allowed, "-o", str(tmp_path / "out"))
        assert code == 1
        assert "has no meaning" not in said


@pytest.mark.parametrize("command", ["report", "diff", "profile"])
def test_numbers_have_bounds(command: str, folder: Path) -> None:
    """No number, however large, is taken as it is."""
    words = {"report": [str(folder / "a.sqlite")], "diff": [str(folder / "a.sqlite")] * 2, "profile": ["--no-nsys"]}[
        command
    ]
    parameters = {"report": report_command, "diff": diff_command, "profile": profile_command}[command].params
    numbers = [p for p in parameters if isinstance(p.type, (click.types.IntParamType, click.IntRange))]
    assert numbers
    for parameter in numbers:
        for value in ("1" + "0" * 20, "-1" + "0" * 20):
            code, said = run(command, *words, f"{parameter.opts[0]}={value}")
            assert code == 2, (parameter.opts, said)


def test_a_capture_with_everything_is_what_the_tests_above_take_it_for(folder: Path) -> None:
    code, said = run("report", str(folder / "a.sqlite"))
    assert code == 0
    assert "1 requests in which something was compiled are left out" in said
    assert Capture is not None
