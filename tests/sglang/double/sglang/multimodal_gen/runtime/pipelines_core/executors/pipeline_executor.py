"""Requests through stages."""

from ...utils import nvtx_pytorch_hooks


class PipelineExecutor:
    def __init__(self, manager):
        self.component_residency_manager = manager

    def execute(self, stages, batch, server_args):
        warmup = batch.is_warmup
        self.component_residency_manager.state.batch_is_warmup = warmup
        for stage in stages:
            enabled = server_args.enable_layerwise_nvtx_marker and not warmup
            stage.current_use_nvtx = enabled
            with nvtx_pytorch_hooks.maybe_nvtx_range(f"stage_{stage.name}", enabled) if enabled else stage.silent():
                stage.forward(batch, self.component_residency_manager)
        return batch

    def execute_with_profiling(self, stages, batch, server_args):
        return self.execute(stages, batch, server_args)

    def execute_group_with_profiling(self, stages, batches, server_args):
        return [self.execute(stages, batch, server_args) for batch in batches]

    def execute_group_sequentially_with_profiling(self, stages, batches, server_args):
        for batch in batches:
            yield self.execute(stages, batch, server_args)
