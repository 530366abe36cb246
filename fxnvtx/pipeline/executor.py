"""A stage with its names, its gate and its ranges; a pipeline, which is components and stages under names that do not
collide; and who runs its stages one after the other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from time import perf_counter_ns
from typing import Any, ClassVar

import torch
from torch import nn

from ..errors import ConfigError, PipelineError
from ..ranges import Label, label, range
from .args import ServerArgs
from .component_use import ComponentUse
from .manager import ComponentResidencyManager
from .memory import Place
from .request import RequestMetrics, StageProfiler, device_memory, running, running_with
from .strategies import strategy_class

__all__ = [
    "KINDS",
    "ComposedPipeline",
    "PipelineExecutor",
    "PipelineStage",
    "StageParallelism",
    "SyncExecutor",
    "profile_names",
    "stage_range_label",
]


# -------------------------------------------------------------------------------------------------------------- a stage


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


# ---------------------------------------------------------------------------------------------------------- who runs it


# A server that runs for months must not register a string per request for ever.
DISTINCT_REQUEST_LABELS = 1 << 16
WARMUP = label("warmup", "request")  # of no range: a warm-up shows none


class PipelineExecutor:
    """Base of the executors. Whether ranges are wanted is decided once per execute, here, for everything below."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    # ------------------------------------------------------------------------------------------------- decisions

    @staticmethod
    def _is_warmup_payload(payload: Any) -> bool:
        """Whether a request, or every request of a group, is a warm-up. An empty group is none."""
        if isinstance(payload, (list, tuple)):
            return bool(payload) and all(getattr(item, "is_warmup", False) is True for item in payload)
        return getattr(payload, "is_warmup", False) is True

    def _should_use_stage_nvtx(self, payload: Any, args: ServerArgs) -> bool:
        return args.stage_ranges and not self._is_warmup_payload(payload)

    # ----------------------------------------------------------------------------------------------------- hooks

    @contextmanager
    def _component_residency_request(
        self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs, use_nvtx: bool
    ) -> Iterator[None]:
        """A request of the residency manager; finished however the block ends."""
        manager = pipeline.residency
        request = manager.begin_request(
            pipeline.stages.values(), args, is_warmup=self._is_warmup_payload(payload), use_nvtx=use_nvtx
        )
        try:
            yield
        finally:
            manager.finish_request(request)

    def _run_stage_with_executor_hooks(
        self, pipeline: ComposedPipeline, stage: PipelineStage, payload: Any, args: ServerArgs, use_nvtx: bool
    ) -> Any:
        """Tell the manager, then run the stage inside its range."""
        pipeline.residency.before_stage(stage)
        text = stage_range_label(stage.component_name)
        with range(text, enabled=use_nvtx, payload=self._stage_payload()), running_with(stage=stage):
            return self._run_stage(pipeline, stage, payload, args)

    def _run_stage(self, pipeline: ComposedPipeline, stage: PipelineStage, payload: Any, args: ServerArgs) -> Any:
        with pipeline.residency.stage_uses(stage):
            if isinstance(payload, list):
                return stage.run_grouped_requests(payload, args)
            return stage(payload, args)

    def _stage_payload(self) -> int | None:
        return None

    # --------------------------------------------------------------------------------------------------- running

    def execute(self, pipeline: ComposedPipeline, batch: Any, args: ServerArgs) -> Any:
        """Run one request; returns the batch that the last stage returned."""
        return self._execute(pipeline, batch, args)

    def execute_group(self, pipeline: ComposedPipeline, batches: Sequence[Any], args: ServerArgs) -> list[Any]:
        """Run several requests, all of them through one stage before any goes through the next."""
        if not batches:
            raise PipelineError("a group needs at least one request")
        found = self._execute(pipeline, list(batches), args)
        assert isinstance(found, list)
        return found

    def _execute(self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs) -> Any:
        pipeline.check(args)
        use_nvtx = self._should_use_stage_nvtx(payload, args)
        single = not isinstance(payload, list)
        texts = [self._next_label(item) for item in ([payload] if single else payload)]
        outer = texts[0] if single else label("request_group", "request")
        if use_nvtx and args.enable_layerwise_nvtx_marker:
            pipeline.residency.attach_ahead(pipeline.stages.values(), args)
        with (
            running_with(
                use_nvtx=use_nvtx,
                manager=pipeline.residency,
                profiler=None,
                stage=None,
                requests=None if single else tuple(texts),
            ),
            cuda_profiler_range(args.cuda_profiler_range and not self._is_warmup_payload(payload)),
            _totals(payload, texts, use_nvtx),
            range(outer or WARMUP, payload=None if single else len(texts), enabled=use_nvtx and outer is not None),
            self._component_residency_request(pipeline, payload, args, use_nvtx),
        ):
            for stage in pipeline.stages.values():
                payload = self._run_stage_with_executor_hooks(pipeline, stage, payload, args, use_nvtx)
        return payload

    def _next_label(self, batch: Any) -> Label | None:
        """`request#N`, N counting the requests that are no warm-ups. A warm-up has none."""
        if self._is_warmup_payload(batch):
            return None
        return label(f"request#{next(self._numbers) % DISTINCT_REQUEST_LABELS}", "request")


class SyncExecutor(PipelineExecutor):
    """One stage after the other on this process."""


@contextmanager
def cuda_profiler_range(enabled: bool) -> Iterator[None]:
    """cudaProfilerStart and cudaProfilerStop around a block, for captures limited to them. Nothing without CUDA."""
    if not enabled or not torch.cuda.is_available():
        yield
        return
    runtime = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


@contextmanager
def _totals(payload: Any, texts: Sequence[Label | None], use_nvtx: bool) -> Iterator[None]:
    begin = perf_counter_ns()
    try:
        yield
    finally:
        spent = (perf_counter_ns() - begin) / 1e6
        for batch, text in zip(payload if isinstance(payload, list) else [payload], texts, strict=True):
            metrics = getattr(batch, "metrics", None)
            if isinstance(metrics, RequestMetrics):
                metrics.range, metrics.total_ms = text.text if text is not None and use_nvtx else None, spent


# --------------------------------------------------------------------------------------------------------- the pipeline


KINDS = ("dit", "vae", "text_encoder", "image_encoder", "other")


class ComposedPipeline:
    """Stages in order, and the components they use.

    Calling it runs one request; `run_grouped` several at once. `components` may be changed between requests, and in the
    middle of one: the next use takes what is there.
    """

    name = "pipeline"

    def __init__(
        self, args: ServerArgs | None = None, *, executor: PipelineExecutor | None = None, place: Place | None = None
    ) -> None:
        self.args = args or ServerArgs()
        self.components: dict[str, Any] = {}
        self.kinds: dict[str, str] = {}
        self.stages: dict[str, PipelineStage] = {}
        self.executor = executor or SyncExecutor()
        self.residency = ComponentResidencyManager(self.components, self.kinds, self.args, place)

    def add_component(self, name: str, module: nn.Module, kind: str = "other") -> nn.Module:
        """Give the pipeline a component and put its weights where they are to wait; `kind` picks its flag."""
        if kind not in KINDS:
            raise PipelineError(f"kind={kind!r} of component {name!r} has no meaning: use {', '.join(KINDS)}")
        self.components[name], self.kinds[name] = module, kind
        self.residency.refresh_pipeline()
        return module

    def add_stage(self, name: str, stage: PipelineStage) -> PipelineStage:
        """Append a stage under a name of its own. Raises PipelineError where it is there already."""
        if not isinstance(stage, PipelineStage):
            raise PipelineError(f"stage {name!r} must be a PipelineStage, not {type(stage).__name__}")
        if not name or name in self.stages:
            raise PipelineError(f"there is a stage named {name!r} already: every stage needs a name of its own")
        for known, other in self.stages.items():
            if other is stage:
                raise PipelineError(f"stage {name!r} is the same object as {known!r}: make a second one")
        self.stages[name] = stage
        stage.set_registered_stage_name(name)
        names = profile_names({key: type(s).__name__ for key, s in self.stages.items()})
        for key, found in self.stages.items():
            found.set_profile_stage_name(names[key])
        return stage

    def check(self, args: ServerArgs) -> None:
        """Raise where there is nothing to run, or where `args` name a component that is not there, or ask for one to be
        offloaded that no stage declares a use of: nothing would ever bring it in."""
        if not self.stages:
            raise PipelineError(f"pipeline {self.name!r} has no stages: add_stage() some")
        for where, named in (
            ("residency", list(args.residency)),
            ("layerwise_offload_components", args.layerwise_offload_components or []),
        ):
            for component in named:
                if component not in self.components:
                    known = ", ".join(self.components)
                    raise ConfigError(f"{where} names {component!r}, which is none of the components: {known}")
        declared = {use.component for name, s in self.stages.items() for use in s.component_uses(args, name)}
        for component, mode in args.residency.items():
            if strategy_class(mode).offloads and component not in declared:
                raise ConfigError(
                    f"residency asks for {component!r} to be {mode}, but no stage has a ComponentUse declaration: "
                    "let component_uses() of the stage that needs it return one, or keep it resident"
                )

    def __call__(self, batch: Any, args: ServerArgs | None = None) -> Any:
        """Run one request through all stages; returns the batch."""
        return self.executor.execute(self, batch, args or self.args)

    def run_grouped(self, batches: list[Any], args: ServerArgs | None = None) -> list[Any]:
        """Run several requests together, stage by stage; returns the batches in their order."""
        return self.executor.execute_group(self, batches, args or self.args)


def profile_names(classes: dict[str, str]) -> dict[str, str]:
    """Registered name -> profile name, for registered name -> class name. All different.

    A stage is called by its class where nothing else can be meant by that, else by its registered name.
    """
    count = Counter(classes.values())
    return {
        name: kind if count[kind] == 1 and (kind == name or kind not in classes) else name
        for name, kind in classes.items()
    }
