"""Executors: a request through the stages, with its range, its gate and its component residency."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch

from ..errors import PipelineError
from ..ranges import Label, label, range
from .args import ServerArgs
from .context import running_with
from .profiler import RequestMetrics
from .stage import PipelineStage, stage_range_label

if TYPE_CHECKING:
    from .composed import ComposedPipeline

__all__ = ["PipelineExecutor", "SyncExecutor"]

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
