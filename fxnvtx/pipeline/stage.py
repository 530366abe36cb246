"""PipelineStage: one piece of work of a pipeline, with its names, its gate and its ranges."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import PipelineError
from ..ranges import Label, label, range
from .args import ServerArgs
from .component_use import ComponentUse
from .request import RequestMetrics, StageProfiler, device_memory, running, running_with

__all__ = ["PipelineStage", "StageParallelism", "stage_range_label"]


class StageParallelism(Enum):
    """Which ranks of a parallel executor run a stage, and how the others get its result."""

    REPLICATED = "every rank runs it"
    MAIN_RANK_ONLY = "rank 0 runs it, the others wait"
    MAIN_RANK_ONLY_AND_SEND_TO_OTHERS = "rank 0 runs it and sends the result to the others"
    CFG_PARALLEL = "rank 0's request is sent to the ranks that share the guidance passes, then all of them run it"


def stage_range_label(name: str) -> Label:
    """The label of the range around a stage."""
    return label(f"stage_{name}", "stage")


class PipelineStage:
    """Subclass it and write `forward(batch, args)`. A subclass need not call super().__init__().

    Names: the registered name is unique in a pipeline and is what ranges carry; the profile name is what metrics carry.
    """

    parallelism: ClassVar[StageParallelism] = StageParallelism.REPLICATED
    deduplicated: ClassVar[tuple[str, ...]] = ()
    """Fields of a batch that this stage makes from `deduplication_key` alone; equal keys share one run."""

    _component_name: str | None = None
    _registered_stage_name: str | None = None
    _profile_stage_name: str | None = None
    modules: Any = None
    """Components by name, for a stage that runs outside of any pipeline."""

    # --------------------------------------------------------------------------------------------- for subclasses

    def forward(self, batch: Any, args: ServerArgs) -> Any:
        """The work. Returns the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch, args)")

    def verify_input(self, batch: Any, args: ServerArgs) -> list[str]:
        """What is wrong with the batch before the stage; nothing: an empty list."""
        return []

    def verify_output(self, batch: Any, args: ServerArgs) -> list[str]:
        """What is wrong with the batch after the stage."""
        return []

    def component_uses(self, args: ServerArgs, stage_name: str) -> list[ComponentUse]:
        """The components that this stage will use, in order."""
        return []

    def parallelism_for(self, batch: Any) -> StageParallelism:
        """How a parallel executor runs this stage for this batch (a list for a group). Every rank must answer alike."""
        return self.parallelism

    def deduplication_key(self, batch: Any, args: ServerArgs) -> Hashable | None:
        """Batches with equal keys get the same result from this stage; None: run every one."""
        return None

    # ------------------------------------------------------------------------------------------------------ names

    def set_registered_stage_name(self, name: str) -> None:
        self._registered_stage_name = name

    def set_profile_stage_name(self, name: str) -> None:
        self._profile_stage_name = name

    @property
    def component_name(self) -> str:
        """What ranges and uses call this stage: an explicit name, else the registered one, else its class."""
        return self._component_name or self._registered_stage_name or type(self).__name__

    @property
    def active_component_name(self) -> str:
        """The stage that component uses belong to now: the manager's current one, else this one."""
        manager = running().manager
        current = manager.current_stage_name if manager is not None else None
        return current or self.component_name

    @property
    def profile_stage_name(self) -> str:
        """What metrics call this stage."""
        return self._profile_stage_name or type(self).__name__

    # ------------------------------------------------------------------------------------------------------- gate

    @property
    def current_use_nvtx(self) -> bool:
        """Whether ranges are wanted now. Read-only: it is decided once per request."""
        return running().use_nvtx is True

    def _apply_nvtx_gate(self, is_warmup: bool, args: ServerArgs) -> AbstractContextManager[Any]:
        """The gate for one call: what the request has decided already, else flag and not warm-up."""
        decided = running().use_nvtx
        return running_with(use_nvtx=args.stage_ranges and not is_warmup if decided is None else decided)

    # ---------------------------------------------------------------------------------------------------- running

    def __call__(self, batch: Any, args: ServerArgs) -> Any:
        """Verify, run `forward` with its range and its figures, verify. Raises PipelineError where a check fails."""
        self._require(self.verify_input(batch, args), "input")
        announced = running().stage is self  # an executor has opened this stage's range
        with self._apply_nvtx_gate(bool(getattr(batch, "is_warmup", False)), args), running_with(stage=None):
            text = stage_range_label(self.component_name)
            with (
                self._profile(batch, args, text.text),
                range(text, enabled=self.current_use_nvtx and not announced),
            ):
                result = self.forward(batch, args)
        self._require(self.verify_output(result, args), "output")
        return result

    def run_grouped_requests(self, batches: Sequence[Any], args: ServerArgs) -> list[Any]:
        """Run the stage for several requests: once per distinct key where the stage says what its result depends on."""
        first: dict[Hashable, Any] = {}
        results = []
        texts = running().requests or (None,) * len(batches)
        for batch, text in zip(batches, texts, strict=True):
            key = self.deduplication_key(batch, args)
            if key is not None and key in first:
                for name in self.deduplicated:
                    setattr(batch, name, getattr(first[key], name))
                results.append(batch)
                continue
            with range(text or self.component_name, enabled=text is not None and self.current_use_nvtx):
                result = self(batch, args)
            if key is not None:
                first[key] = result
            results.append(result)
        return results

    # --------------------------------------------------------------------------------- what forward may make use of

    def ranged(self, text: str | Label, category: str = "op", payload: object = None) -> range:
        """A range inside this stage, where ranges are wanted. `text` must come from a fixed set."""
        return range(text, category=category, payload=payload, enabled=self.current_use_nvtx)

    @contextmanager
    def step(self, text: Label, index: int = 0) -> Iterator[None]:
        """One step of a loop: its range, its figures, and whether layers show in it."""
        now = running()
        if now.manager is not None and now.manager.in_request:
            now.manager.show_step(index)
        figures = now.profiler.step(self.profile_stage_name, text.text) if now.profiler is not None else nullcontext()
        with figures, self.ranged(text, payload=index):
            yield

    @contextmanager
    def use_component(
        self, name: str, phase: str | None = None, *, dtype: torch.dtype | None = None
    ) -> Iterator[nn.Module]:
        """A component with its weights there and its layers shown, for the length of a block."""
        manager = running().manager
        if manager is not None and manager.in_request:
            with manager.use_component(name, phase, dtype=dtype) as module:
                yield module
        elif self.modules is not None and name in self.modules:
            yield self.modules[name]
        else:
            raise PipelineError(f"stage {self.component_name} has no component {name!r}: add the stage to a pipeline")

    # ---------------------------------------------------------------------------------------------------- details

    @contextmanager
    def _profile(self, batch: Any, args: ServerArgs, text: str) -> Iterator[None]:
        metrics = getattr(batch, "metrics", None)
        if not isinstance(metrics, RequestMetrics):
            yield
            return
        profiler = StageProfiler(metrics, sync=args.sync_steps, memory=self._memory if args.memory_snapshots else None)
        with running_with(profiler=profiler), profiler.stage(self.profile_stage_name, text):
            yield

    def _memory(self) -> dict[str, int]:
        manager = running().manager
        weights = {"resident_weights": manager.account.resident_bytes} if manager is not None else {}
        return {**weights, **device_memory()}

    def _require(self, problems: list[str], what: str) -> None:
        if problems:
            raise PipelineError(f"stage {self.component_name}: wrong {what}: {'; '.join(problems)}")
