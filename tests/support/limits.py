"""How long a test waits for what runs beside it: so long that only what hangs is given up.

A slow machine (an emulated one, eight suites at once) sets FXNVTX_TEST_PATIENCE to a factor; nothing else in the tests
depends on how fast the machine is.
"""

from __future__ import annotations

import os

_PATIENCE = float(os.environ.get("FXNVTX_TEST_PATIENCE", "1"))
CHILD_S = 1800 * _PATIENCE
"""For another process, which may have to import torch, to compile and to write a capture."""
THREAD_S = 300 * _PATIENCE
"""For another thread of this process."""
