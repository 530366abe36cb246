"""ParallelExecutor: one pipeline on several ranks of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from .. import ranges
from ..ranges import label
from .args import ServerArgs
from .collective import Group
from .context import running_with
from .executor import PipelineExecutor
from .profiler import RequestMetrics
from .stage import PipelineStage, StageParallelism

if TYPE_CHECKING:
    from .composed import ComposedPipeline

__all__ = ["ParallelExecutor"]


class ParallelExecutor(PipelineExecutor):
    """Every rank calls `execute` with its copy of the request; each stage says which ranks run it.

    A stage that fails on any rank raises the same error on every rank. All ranges of a rank lie in one called
    `rank_<n>`, and recordings that are running get the rank into their `meta`.
    """

    def __init__(self, group: Group | None = None) -> None:
        super().__init__()
        self.group = group or Group()

    def _execute(self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs) -> Any:
        rank = self.group.rank
        for sink in ranges.sinks:
            meta = getattr(sink, "meta", None)
            if isinstance(meta, dict):
                meta["rank"] = rank
        use_nvtx = self._should_use_stage_nvtx(payload, args)
        with (
            ranges.range(label(f"rank_{rank}", "op"), payload=rank, enabled=use_nvtx),
            running_with(group=self.group),
        ):
            return super()._execute(pipeline, payload, args)

    @contextmanager
    def _component_residency_request(
        self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs, use_nvtx: bool
    ) -> Iterator[None]:
        request: AbstractContextManager[None] = super()._component_residency_request(pipeline, payload, args, use_nvtx)
        with ExitStack() as stack:
            self.group.together(lambda: stack.enter_context(request))
            yield

    def _run_stage(self, pipeline: ComposedPipeline, stage: PipelineStage, payload: Any, args: ServerArgs) -> Any:
        group, kind = self.group, stage.parallelism_for(payload)

        def work() -> Any:
            return PipelineExecutor._run_stage(self, pipeline, stage, payload, args)

        if kind is StageParallelism.REPLICATED:
            return group.together(work)
        if kind is StageParallelism.CFG_PARALLEL:
            payload = _received(group.broadcast(payload, "broadcast_cfg"), payload)
            return group.together(work)
        if group.rank == 0:
            # a failure is told in the same call in which the others wait
            payload = self._main(work)
        if kind is StageParallelism.MAIN_RANK_ONLY:
            group.barrier()
            return payload
        return _received(group.broadcast(payload), payload)

    def _main(self, work: Any) -> Any:
        try:
            return work()
        except BaseException as error:
            self.group.fail(error)
            raise

    def _stage_payload(self) -> int | None:
        return self.group.rank


def _received(new: Any, old: Any) -> Any:
    """A batch that came from rank 0, with this rank's own figures."""
    if new is old:
        return new
    pairs = zip(new, old, strict=True) if isinstance(new, list) else [(new, old)]
    for fresh, known in pairs:
        metrics = getattr(known, "metrics", None)
        if isinstance(metrics, RequestMetrics):
            fresh.metrics = metrics
    return new
