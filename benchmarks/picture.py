"""docs/compiled-step.svg: one call of a compiled DiT as its timeline shows it, without and with fxnvtx's backend.

    python benchmarks/picture.py [FILE]

Both halves are recorded here, from one model with the same weights: above, instrumented and compiled by "inductor"
(what any tool sees that puts ranges around module calls: the compiled region is one call); below, by "fxnvtx".
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

import torch

import fxnvtx
from fxnvtx.models.dit import DiT
from fxnvtx.recording import Range

WIDTH, ROW, MARGIN = 1180, 22, 16
LEGEND = {
    "model and blocks": "#44546a",
    "attention": "#2a7f9e",
    "MLP": "#5a8f3c",
    "norm, modulation": "#b98b1d",
    "fused from several": "#c8553d",
    "other": "#7a6aa8",
}


def recorded(backend: str) -> list[Range]:
    """The ranges of one settled call, the call itself first."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    dit = DiT(channels=4, dim=256, depth=2, heads=4, text_dim=64).eval()
    arguments = torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.randn(1, 16, 64), torch.randn(1, 64)
    call = torch.compile(fxnvtx.instrument(dit, "dit"), backend=backend)
    calls = []
    with torch.inference_mode():
        call(*arguments)
        for _ in range(50):
            with fxnvtx.record() as recording:
                call(*arguments)
            calls.append([r for r in recording.ranges if r.end_ns is not None])
    return min(calls, key=lambda ranges: (ranges[0].end_ns or 0) - ranges[0].start_ns)  # the least disturbed


def colour(label: str) -> str:
    last = label.rsplit("blocks.", 1)[-1]
    kind = "other"
    if label.startswith("fused("):
        kind = "fused from several"
    elif ".attn" in label:
        kind = "attention"
    elif ".mlp" in label:
        kind = "MLP"
    elif "norm" in last or "modulation" in last:
        kind = "norm, modulation"
    elif label == "dit" or last.isdigit():
        kind = "model and blocks"
    return LEGEND[kind]


def lane(ranges: list[Range], top: int) -> tuple[list[str], int]:
    """The boxes of one call, from `top` down, and the height they take (pixels)."""
    start = min(r.start_ns for r in ranges)
    scale = (WIDTH - 2 * MARGIN) / (max(r.end_ns or 0 for r in ranges) - start)
    boxes = []
    for r in ranges:
        x, width = MARGIN + (r.start_ns - start) * scale, max(((r.end_ns or 0) - r.start_ns) * scale, 0.8)
        y = top + r.depth * ROW
        boxes.append(
            f"<g><title>{escape(r.label)}: {((r.end_ns or 0) - r.start_ns) / 1e3:.1f} us</title>"
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 2}" rx="2" fill="{colour(r.label)}"/>'
        )
        short = r.label if r.depth < 2 else ".".join(r.label.split(".")[r.depth + 1 :])
        short = short.removeprefix("dit.") or r.label
        room = int((width - 6) / 6.1)
        if room >= 3:
            text = short if len(short) <= room else short[: room - 1] + "…"
            boxes.append(f'<text x="{x + 3:.1f}" y="{y + 14}" fill="#fff">{escape(text)}</text>')
        boxes.append("</g>")
    return boxes, (max(r.depth for r in ranges) + 1) * ROW


def picture() -> str:
    parts: list[str] = []
    y = MARGIN
    for title, backend in (
        ("torch.compile, ranges around module calls: the compiled region is one box", "inductor"),
        ('the same model, the same kernels, backend="fxnvtx"', "fxnvtx"),
    ):
        parts.append(f'<text class="title" x="{MARGIN}" y="{y + 12}">{escape(title)}</text>')
        boxes, height = lane(recorded(backend), y + 22)
        parts += boxes
        y += height + 22 + MARGIN
    x = MARGIN
    for name, shade in LEGEND.items():
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" fill="{shade}"/>')
        parts.append(f'<text class="key" x="{x + 17}" y="{y + 10}">{escape(name)}</text>')
        x += 34 + 7 * len(name)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 28}"'
        ' font-family="sans-serif" font-size="11">'
        "<style>.title{font-size:14px;font-weight:600;fill:#24292f}.key{fill:#24292f}</style>"
        f'<rect width="{WIDTH}" height="{y + 28}" fill="#fff"/>'
    )
    return head + "\n".join(parts) + "</svg>\n"


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "compiled-step.svg")
    target.parent.mkdir(exist_ok=True)
    target.write_text(picture(), encoding="utf-8")
    print(target)
