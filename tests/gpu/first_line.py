"""`python -m tests.gpu.first_line MODE DEVICE`: compiles one model and prints what must not depend on the mode.

MODE: "plain" (nothing of ours), "silent", "recorder" (on from before torch is imported).
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import fxnvtx  # before torch, as in a user's first line

MODE, DEVICE = sys.argv[1:]
recorder = contextlib.ExitStack()
if MODE == "recorder":
    recorder.enter_context(fxnvtx.record())

import torch  # noqa: E402 - see above

from ..compile.generated import counted, kernel_hashes, without_graph_caches  # noqa: E402
from ..compile.listeners.children import WIDTH  # noqa: E402
from .models import Hooked  # noqa: E402


def main() -> None:
    torch.manual_seed(0)
    model = Hooked().to(DEVICE)
    if MODE != "plain":
        fxnvtx.instrument(model, "net")
    x = torch.arange(3.0 * WIDTH).reshape(3, WIDTH).to(DEVICE) / 10
    facts: dict[str, Any] = {"results": []}
    with without_graph_caches(), counted() as counters, torch.no_grad():
        compiled = torch.compile(model, backend="inductor" if MODE == "plain" else "fxnvtx")
        facts["results"].append(compiled(x).tolist())
        recorder.close()  # nobody listens any more, and nothing is compiled again
        facts["results"].append(compiled(x).tolist())
        with fxnvtx.record() as recording:
            facts["results"].append(compiled(x).tolist())
    facts |= {**counters, "kernels": kernel_hashes()}
    print(json.dumps({"facts": facts, "labels": sorted({r.label for r in recording.ranges})}))


if __name__ == "__main__":
    main()
