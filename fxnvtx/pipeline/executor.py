"""A pipeline, components and stages under names that do not collide, and who runs its stages one after the other."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, PipelineError
from ..ranges import Label, label, range
from .args import ServerArgs
from .manager import ComponentResidencyManager
from .memory import Place
from .request import RequestMetrics, running_with
from .stage import PipelineStage, stage_range_label

__all__ = ["KINDS", "ComposedPipeline", "PipelineExecutor", "SyncExecutor", "profile_names"]


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
            if mode != "resident" and component not in declared:
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
