"""Which denoising steps: windows such as "4-8,20", and the fixed labels of a step."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..ranges import Label, label

__all__ = ["StepWindows", "step_label"]


@dataclass(frozen=True)
class StepWindows:
    """A set of step indices, from 0, as closed intervals. Without any interval: every step."""

    intervals: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> StepWindows:
        """ "4-8,20" -> steps 4 to 8 and 20. None and "" mean all steps.

        Raises ConfigError where the text is no list of steps.
        """
        if text is None or not text.strip():
            return cls()
        return cls(tuple(_interval(part, text) for part in text.split(",")))

    def __contains__(self, step: int) -> bool:
        return not self.intervals or any(first <= step <= last for first, last in self.intervals)


def _interval(part: str, text: str) -> tuple[int, int]:
    first, dash, last = part.strip().partition("-")
    try:
        begin = int(first)
        end = int(last) if dash else begin
    except ValueError:
        raise ConfigError(f"nvtx_steps={text!r} is no list of steps: write it like 4-8,20") from None
    if begin < 0 or end < begin:
        raise ConfigError(f"nvtx_steps={text!r}: {part.strip()} is empty, its first step lies after its last")
    return begin, end


def step_label(index: int, timestep: float) -> Label:
    """The label of one denoising step. Equal steps of every request share one registered string.

    `timestep` is shown as a whole number where it is one, else with four digits.
    """
    shown = str(int(timestep)) if float(timestep).is_integer() else f"{timestep:.4g}"
    return label(f"denoising_step_{index}_t{shown}", "step")
