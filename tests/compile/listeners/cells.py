"""`python -m tests.compile.listeners.cells MODE OUTPUT`: compiles the cells of the matrix, all in one process.

MODE: "plain" (nothing of ours), "silent", "recorder" (on from before torch is imported), "tool" (the caller has an NVTX
tool attached). A cell is one model compiled in one way; what must not depend on the mode goes to OUTPUT as JSON, with
the labels of its second call.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import fxnvtx  # before torch, as in a user's first line

MODE, OUTPUT = sys.argv[1], Path(sys.argv[2])
listening = [fxnvtx.record()] if MODE == "recorder" else []
for recorder in listening:
    recorder.__enter__()

import torch  # noqa: E402 - see above
from torch import nn  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from ..generated import kernel_hashes, without_graph_caches  # noqa: E402
from ..models import in_place, regional, whole  # noqa: E402
from .children import CHILDREN, ROOTS, WIDTH, Mixed, Net, Outer  # noqa: E402

OURS = MODE != "plain"
SOME = ("plain", "forward_hook", "instance_forward", "own_call")


class Counting:
    """A backend that runs the graph as it is and counts the operations it was given."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def __call__(self, graph_module: Any, inputs: Any) -> Any:
        operations = [n for n in graph_module.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        self.graphs.append(len(operations))
        return graph_module.forward


def wrapped(model, backend):
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend=backend)
    return model


def forwards(model, backend):
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=backend)
    return model


def three_calls(call, x, training):
    """Silence, a recorder, and no listener from the first line on: none of the changes between may be noticed."""
    yield call(x)
    with fxnvtx.record() if OURS else contextlib.nullcontext() as recording:
        yield call(x)
    for recorder in listening:
        recorder.__exit__(None, None, None)
    yield call(x)
    if listening:
        listening[0] = fxnvtx.record()
        listening[0].__enter__()
    yield [] if recording is None else [r.label for r in recording.ranges]


def cell(model, way, *, inner=False, training=False, backend=None):
    """`inner`: with our backend around the counting one, else with the counting backend alone."""
    torch._dynamo.reset()
    counters.clear()
    model.train(training)
    if OURS:
        fxnvtx.instrument(model, "net")
    counting = Counting()
    chosen = backend or (fxnvtx.backend(counting) if inner and OURS else counting)
    call = way(model, chosen)
    x = torch.arange(3.0 * WIDTH).reshape(3, WIDTH) / 10
    results, error, labels = [], "", []
    try:
        with torch.set_grad_enabled(training):
            for result in three_calls(call, x, training):
                if isinstance(result, list):
                    labels = result
                    break
                results.append(result.detach().flatten().tolist())
                if training:
                    model.zero_grad()
                    result.sum().backward()
                    results += [_whole_tensor(p.grad).flatten().tolist() for p in model.parameters()]
    except Exception as raised:  # plain torch may refuse a cell, then all must, in the same words
        error = f"{type(raised).__name__}: {str(raised).splitlines()[0]}"
    return {
        "results": results,
        "error": error,
        "graphs": counting.graphs,
        "breaks": sum(counters["graph_break"].values()),
        "frames": dict(counters["frames"]),
        "unique": counters["stats"]["unique_graphs"],
    }, sorted(set(labels))


def _whole_tensor(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def strict_export(model):
    torch._dynamo.reset()
    model.eval()
    if OURS:
        fxnvtx.instrument(model, "net")
    x = torch.ones(3, WIDTH)
    try:
        program = torch.export.export(model, (x,), strict=True)
        return {"nodes": len(program.graph.nodes), "results": program.module()(x).flatten().tolist()}, []
    except Exception as raised:
        return {"error": f"{type(raised).__name__}: {str(raised).splitlines()[0]}"}, []


def made(make, *args):
    torch.manual_seed(0)
    return make(*args)


def main() -> None:
    cells: dict[str, Any] = {}
    for kind, change in CHILDREN.items():
        for way in (whole, regional, *((in_place, wrapped, forwards) if kind in SOME else ())):
            cells[f"{kind} {way.__name__}"] = cell(made(Net, change), way, inner=True)
        cells[f"{kind} sequential"] = cell(made(lambda c: nn.Sequential(*Net(c, 1).blocks), change), whole, inner=True)
        cells[f"{kind} training"] = cell(made(Net, change), whole, inner=True, training=True)
        if kind != "tensor_parallel":  # torch does not export it
            cells[f"{kind} export"] = strict_export(made(Net, change))
        if kind in SOME:
            cells[f"{kind} nested"] = cell(made(Outer, change), whole, inner=True)
            cells[f"{kind} other backend"] = cell(made(Net, change), whole)
        if kind in ROOTS:
            cells[f"{kind} root"] = cell(change(made(Net, CHILDREN["plain"])), whole, inner=True)
    with without_graph_caches():
        found, labels = cell(made(Mixed), whole, backend="fxnvtx" if OURS else "inductor")
        cells["mixed inductor"] = {**found, "kernels": kernel_hashes()}, labels
    OUTPUT.write_text(json.dumps(cells))


if __name__ == "__main__":
    main()
