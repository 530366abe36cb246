"""The runtime whose structure gets ranges: stages, executors, and where weights are."""

from .args import ServerArgs
from .batch import Batch
from .composed import ComposedPipeline
from .executor import PipelineExecutor, SyncExecutor
from .parallel import ParallelExecutor
from .profiler import RequestMetrics, StageProfiler
from .residency import ComponentResidencyManager, ComponentUse
from .run import PIPELINES, Result, run
from .stage import PipelineStage, StageParallelism

__all__ = [
    "PIPELINES",
    "Batch",
    "ComponentResidencyManager",
    "ComponentUse",
    "ComposedPipeline",
    "ParallelExecutor",
    "PipelineExecutor",
    "PipelineStage",
    "RequestMetrics",
    "Result",
    "ServerArgs",
    "StageParallelism",
    "StageProfiler",
    "SyncExecutor",
    "run",
]
