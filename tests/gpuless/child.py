"""Runs one group of cases in this process and prints what was found, one line of JSON each."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import fxnvtx

from . import device

Found = tuple[list[str], list[str]]


def say(name: str, run: Callable[[], Found]) -> None:
    try:
        problems, labels = run()
    except Exception:
        problems, labels = [traceback.format_exc(limit=-4)], []
    print(json.dumps({"case": name, "problems": problems, "labels": labels}), flush=True)


def graphs() -> Found:
    """CUDA graphs: the region is shown in every call, its layers where its code runs, also when recorded anew."""
    from .models import Dit

    found: list[str] = []
    model = fxnvtx.instrument(Dit().eval(), "net", path="hooks")
    x = torch.rand(2, 5, 6)
    with device.Graphs().instead() as trees, torch.no_grad():
        compiled = torch.compile(model, backend="fxnvtx", mode="reduce-overhead")
        for turn, event in enumerate(["run", "record", "replay", "replay", "record", "replay"]):
            trees.events.clear()
            trees.generation += turn == 4
            with fxnvtx.record() as recording:
                compiled(x)
            labels = [r.label for r in recording.ranges]
            if trees.events != [event]:
                found.append(f"call {turn}: {trees.events}, not {event}")
            if "net" not in labels or not recording.balanced:
                found.append(f"call {turn} ({event}): {labels}")
            if ("net.blocks.1.attn" in labels) != (event != "replay"):
                found.append(f"call {turn} ({event}): layers {labels}")
    return found, []


def main(group: str) -> None:
    device.install(interpreted=group == "interpreted")
    from .cases import GROUPS, TEMPLATES
    from .check import problems

    for name, case in GROUPS.get(group, {}).items():
        say(name, lambda c=case: problems(c, values=group == "interpreted"))  # type: ignore[misc]
    if group == "templates":
        for name, (wanted, case) in TEMPLATES.items():

            def chosen(case: Any = case, wanted: tuple[str, ...] = wanted) -> Found:
                with device.choosing(*wanted):
                    return problems(case)

            say(name, chosen)
        say("graphs", graphs)
    if group == "work":
        from .models import Dit, Vae
        from .work import Elementwise, OneRow, work

        torch.manual_seed(1)
        say("dit", lambda: work(Dit, (torch.rand(2, 5, 6),)))
        say("dit trained", lambda: work(Dit, (torch.rand(2, 5, 6),), grad=True))
        say("vae", lambda: work(Vae, (torch.rand(2, 6, 16),)))
        say("elementwise", lambda: work(Elementwise, (torch.rand(8, 128, 64), torch.rand(64))))
        say("one row", lambda: work(OneRow, (torch.rand(1, 64),)))
        say("broadcast", lambda: work(Elementwise, (torch.rand(8, 128, 64), torch.rand(8, 1, 64))))
    if group == "zoo":
        from ..support.work_truth import WAYS, compared

        for name, way in [*(("vae_kl", way) for way in WAYS[1:]), ("pixart", "whole")]:

            def same(name: str = name, way: str = way) -> Found:
                exact, shared, wrong = compared(name, way)
                return wrong if exact > shared else ["nothing compared"], [f"{exact} and {shared}"]

            say(f"{name} {way}", same)


if __name__ == "__main__":
    main(sys.argv[1])
