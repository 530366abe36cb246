"""The categories of ranges: one vocabulary for whoever emits ranges and whoever reads them.

request    one call of a pipeline, or several that run together
stage      a part of a request: encoding a prompt, denoising, decoding. No two stages nest.
loop       all the steps of one denoising
step       one denoising step, and nothing inside it
module     a call of a module of the model
piece      goes on with a module's call that had a range before: compiled code does a call's work in several places
op         work inside any of these that is none of these: a guidance pass, a scheduler's step, a tile of a VAE, a
           kernel fused from several modules, a collective
residency  weights on their way
compile    compilation
"""

from __future__ import annotations

__all__ = [
    "CATEGORIES",
    "COMPILE",
    "LOOP",
    "MODULE",
    "OP",
    "PIECE",
    "REQUEST",
    "RESIDENCY",
    "STAGE",
    "STEP",
    "TASK_SWITCH",
]

REQUEST = "request"
STAGE = "stage"
LOOP = "loop"
STEP = "step"
MODULE = "module"
PIECE = "piece"
OP = "op"
RESIDENCY = "residency"
COMPILE = "compile"

# The text of a mark: what its thread begins from here on lies in the start/end range whose id is its payload, or in
# none (0). Without one it lies in what began last.
TASK_SWITCH = "task switch"

# ARGB. Fixed per category, so that the same colour means the same thing in every capture.
CATEGORIES: dict[str, int] = {
    REQUEST: 0xFF1F77B4,
    STAGE: 0xFF17A2B8,
    LOOP: 0xFF2CA02C,
    STEP: 0xFF98DF8A,
    MODULE: 0xFF9467BD,
    PIECE: 0xFF9467BD,
    OP: 0xFFC5B0D5,
    RESIDENCY: 0xFFFF7F0E,
    COMPILE: 0xFF7F7F7F,
}
