"""The runtime whose structure gets ranges: stages, executors, and where weights are."""

from .args import ServerArgs
from .component_use import ComponentUse
from .executor import ComposedPipeline, PipelineExecutor, PipelineStage, StageParallelism, SyncExecutor
from .manager import ComponentResidencyManager
from .parallel import ParallelExecutor
from .pipelines import PIPELINES, Result, run
from .request import Batch, RequestMetrics, StageProfiler

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
