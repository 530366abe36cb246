"""The plugin's functions by the names in targets.py: what SGLang calls in place of, or around, its own.

Each passes the call on exactly once and hands back what came; what fails on our side is logged once and lost.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ... import ranges
from ...ranges.labels import Label, label
from .layers import Layers, bytes_of, layer_bytes
from .targets import OLDER_TARGETS, TARGETS, Options, guarded, log

__all__ = ["Plugin", "handlers"]

Call = Callable[..., Any]
STEP = re.compile(r"denoising_step_(\d+)_")
# A server that runs for months must not register a string per request for ever.
DISTINCT_REQUEST_LABELS = 1 << 16


def handlers(options: Options) -> dict[str, Any]:
    """The function or class for every handler name in targets.py: what Plugin has of that name."""
    plugin = Plugin(options)
    found = {f"residency_{what}": plugin.residency(what) for what in ("load", "wait", "prefetch", "offload")}
    todo = [*TARGETS, *OLDER_TARGETS]
    for target in todo:
        if target.handler not in found:
            found[target.handler] = getattr(plugin, target.handler)
        if target.older is not None:
            todo.append(target.older)
    return found


class Plugin:
    """What one process remembers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.layers = Layers(options)
        self._numbers = itertools.count()
        self._branches: ContextVar[tuple[Any, ...]] = ContextVar("fxnvtx_sglang_branches", default=())
        self._branch: ContextVar[Any] = ContextVar("fxnvtx_sglang_branch", default=None)
        self._in_request: ContextVar[bool] = ContextVar("fxnvtx_sglang_request", default=False)
        self._moving: ContextVar[bool] = ContextVar("fxnvtx_sglang_moving", default=False)

    # ------------------------------------------------------------------------------ stages, loops and steps

    def maybe_range(self, name: str, enabled: bool = True) -> AbstractContextManager[Any]:
        """SGLang's maybe_nvtx_range."""
        if not enabled:
            return ranges.range(name, enabled=False)
        step = STEP.match(name)
        if step is not None:
            index = int(step[1])
            self.layers.show_step(index)
            return ranges.range(label(name, "step"), payload=index)
        if name == "denoising_loop":
            return self._loop(label(name, "loop"))
        return ranges.range(label(name, "stage" if name.startswith("stage_") else "op"))

    @contextmanager
    def _loop(self, text: Label) -> Iterator[None]:
        with ranges.range(text):
            try:
                yield
            finally:
                self.layers.show_step(None)

    # ----------------------------------------------------------------------------------------------- requests

    def request(self, original: Call, executor: Any, stages: Any, batch: Any, server_args: Any, *rest: Any) -> Any:
        """Around PipelineExecutor.execute_with_profiling and execute_group_with_profiling."""
        with self._request(executor, stages, batch, server_args):
            return original(executor, stages, batch, server_args, *rest)

    def requests_in_turn(
        self, original: Call, executor: Any, stages: Any, batches: Any, server_args: Any, *rest: Any
    ) -> Iterator[Any]:
        """Around a generator: a range each time it runs, none while its caller does."""
        results = iter(original(executor, stages, batches, server_args, *rest))
        try:
            while True:
                with self._request(executor, stages, batches, server_args):
                    try:
                        result = next(results)
                    except StopIteration:
                        return
                yield result
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()

    @contextmanager
    def _request(self, executor: Any, stages: Any, batch: Any, server_args: Any) -> Iterator[None]:
        warmup = is_warmup(batch)
        if wanted(server_args) and not (warmup and nobody_finds_models()):
            self.layers.ahead(executor, stages, server_args)  # in a warm-up: silent here, and so to `fxnvtx run` too
        if warmup or not wanted(server_args):
            yield
            return
        number = next(self._numbers)
        rank, world = ranks()
        group = isinstance(batch, list) and len(batch) > 1
        text = f"request_group#{number}" if group else f"request#{number}"
        with ExitStack() as stack:
            if self.options.record is not None:
                stack.enter_context(recorded(Path(self.options.record), number, rank, world))
            if world > 1:
                stack.enter_context(ranges.range(label(f"rank_{rank}", "request"), payload=rank))
            numbered = label(text if number < DISTINCT_REQUEST_LABELS else text.partition("#")[0], "request")
            stack.enter_context(ranges.range(numbered, payload=len(batch) if group else number))
            token = self._in_request.set(True)
            try:
                yield
            finally:
                self._in_request.reset(token)

    # ------------------------------------------------------------------------------------------ guidance passes

    def guidance(self, original: Call, *args: Any, **kwargs: Any) -> Any:
        """Around DenoisingStage._predict_noise_with_cfg: which branches there are."""
        token = self._branches.set(tuple(getattr(kwargs.get("cfg_policy"), "branches", None) or ()))
        try:
            return original(*args, **kwargs)
        finally:
            self._branches.reset(token)

    def branch(self, original: Call, branch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around CFGBranch.configure_batch: the next pass is this one's."""
        self._branch.set(branch)
        return original(branch, *args, **kwargs)

    def guidance_pass(self, original: Call, stage: Any, *args: Any, **kwargs: Any) -> Any:
        """Around DenoisingStage._predict_noise."""
        if not getattr(stage, "current_use_nvtx", False):
            return original(stage, *args, **kwargs)
        with ranges.range(label(f"predict_noise.{self._pass_name()}", "op")):
            return original(stage, *args, **kwargs)

    def _pass_name(self) -> str:
        branches, branch = self._branches.get(), self._branch.get()
        if len(branches) > 2 and any(branch is b for b in branches):
            return str(branch.name)
        return "unconditional" if negative() else "conditional"

    # ------------------------------------------------------------------------------------------------- residency

    def residency(self, what: str) -> Call:
        """Around a residency strategy's method. What a method of a strategy calls of the same strategy is its own."""

        def moves(original: Call, strategy: Any, module: Any, use: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
            idle = what == "offload" and type(strategy).__name__ == "ResidentStrategy"  # by its base class's method
            if idle or not ranges.listening() or self._moving.get() or not self._shows_moves(state):
                return original(strategy, module, use, state, *args, **kwargs)
            nbytes = bytes_of(what, strategy, module, use)
            text = label(f"residency.{what} {getattr(use, 'component_name', 'component')}", "residency")
            token = self._moving.set(True)
            try:
                with ranges.range(text, payload=nbytes, enabled=nbytes != 0 or what != "wait"):
                    return original(strategy, module, use, state, *args, **kwargs)
            finally:
                self._moving.reset(token)

        return moves

    def layer_comes(
        self, original: Call, manager: Any, layer_idx: int, non_blocking: bool = True, *rest: Any, **kwargs: Any
    ) -> Any:
        """Around LayerwiseOffloadManager.prefetch_layer, which does nothing for a layer that is there or on its way."""
        there = layer_idx in getattr(manager, "_gpu_layers", ()) or layer_idx in getattr(
            manager, "_courier_inflight", ()
        )
        with self._layer_moves("prefetch" if non_blocking else "load", manager, layer_idx, there):
            return original(manager, layer_idx, non_blocking, *rest, **kwargs)

    def layer_goes(self, original: Call, manager: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Around LayerwiseOffloadManager.release_layer, which drops what has a copy and is not to stay."""
        stays = layer_idx in getattr(manager, "_retained_set", ()) and not (args or kwargs.get("force"))
        kept = layer_idx not in getattr(manager, "_gpu_layers", ()) or layer_idx in getattr(
            manager, "_permanent_set", ()
        )
        with self._layer_moves("offload", manager, layer_idx, kept or stays):
            return original(manager, layer_idx, *args, **kwargs)

    def _layer_moves(self, what: str, manager: Any, index: int, nothing: bool) -> AbstractContextManager[Any]:
        if nothing or not ranges.listening() or not self._in_request.get():
            return nullcontext()
        nbytes = layer_bytes(manager, index)
        text = f"residency.{what} {getattr(manager, 'layers_attr_str', 'layers')}.{index}"
        return ranges.range(label(text, "residency"), payload=nbytes, enabled=nbytes != 0)

    @staticmethod
    def _shows_moves(state: Any) -> bool:
        return wanted(None) and not getattr(state, "batch_is_warmup", False)

    # --------------------------------------------------------------------------------------------------- layers

    def hooks_register(self, original: Call, hooks: Any, model: Any, prefix: str = "") -> int:
        """Around DiffusionNvtxHooks.register_hooks: with a count of 0 SGLang keeps no hooks."""
        return self.layers.register(hooks, model, prefix) or 0

    def hooks_enable(self, original: Call, hooks: Any, enabled: bool) -> Any:
        """Around DiffusionNvtxHooks.set_enabled."""
        result = original(hooks, enabled)
        self.layers.set_enabled(hooks, bool(enabled))
        return result

    def hooks_remove(self, original: Call, hooks: Any) -> Any:
        """Around DiffusionNvtxHooks.remove_hooks."""
        self.layers.remove(hooks)  # first: the handles, which SGLang removes one by one, have nothing to do then
        return original(hooks)

    def use_begins(self, original: Call, manager: Any, use: Any, module: Any = None) -> Any:
        """Around ComponentResidencyManager._enable_nvtx_for_use: compiled layers must be silent in a warm-up."""
        result = original(manager, use, module)
        self._silence_a_warmup(manager, use, module)
        return result

    @guarded
    def _silence_a_warmup(self, manager: Any, use: Any, module: Any) -> None:
        if wanted(manager.server_args) and manager.state.batch_is_warmup:
            self.layers.silence(module, manager._nvtx_prefix_for_use(use))

    def compile_arguments(self, result: Any, *args: Any, **kwargs: Any) -> Any:
        """After build_torch_compile_kwargs: Inductor, but with ranges."""
        if wanted(None) and isinstance(result, dict) and result.get("backend", "inductor") == "inductor":
            self.layers.compiles(kwargs.get("module"))
            return {**result, "backend": "fxnvtx"}
        return result

    def module_compiles(self, original: Call, registry: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Around CompiledModuleRegistry.compile_once."""
        if wanted(None):
            self.layers.compiles(module)
        return original(registry, module, *args, **kwargs)

    def stage_compiles(self, original: Call, stage: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Around DenoisingStage._maybe_enable_torch_compile (before 0.5.15), which makes its arguments itself."""
        if not wanted(stage.server_args) or not getattr(stage.server_args, "enable_torch_compile", False):
            return original(stage, module, *args, **kwargs)
        self.layers.compiles(module)
        with self.layers.compiling():
            return original(stage, module, *args, **kwargs)

    def compiled_method(self, original: Call, holder: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ActiveTargetCompiledCallable.get_or_compile: `vae.decode`, compiled; its root is the component's."""
        compiled = original(holder, target, *args, **kwargs)
        return self.layers.rooted(target, compiled) if wanted(None) else compiled

    def compiles_directly(self, original: Call, pipeline: Any, pipe: Any, server_args: Any) -> Any:
        """Around DiffusersPipeline._apply_torch_compile, which calls torch.compile without arguments."""
        if not wanted(server_args):
            return original(pipeline, pipe, server_args)
        with self.layers.compiling():
            return original(pipeline, pipe, server_args)


# ------------------------------------------------------------------------------------------- what SGLang knows


def wanted(server_args: Any) -> bool:
    """Whether SGLang's flag is set; `server_args` None: those of the process."""
    if server_args is None:
        try:
            from sglang.multimodal_gen.runtime.server_args import (  # type: ignore[import-not-found]
                get_global_server_args,
            )

            server_args = get_global_server_args()
        except Exception:  # none are set yet: nobody asked for anything
            return False
    return bool(getattr(server_args, "enable_layerwise_nvtx_marker", False))


def is_warmup(batch: Any) -> bool:
    """Of a request, or of every request of a group."""
    if isinstance(batch, list):
        return bool(batch) and all(getattr(item, "is_warmup", False) for item in batch)
    return bool(getattr(batch, "is_warmup", False))


def nobody_finds_models() -> bool:
    """Whether only what is named here shows. `fxnvtx run` puts a descriptor where a module's slot is, and finds every
    model that has no slot of its own."""
    from torch import nn

    from ...modules.call_slot import SLOT

    return nn.Module.__dict__.get(SLOT) is None


def negative() -> bool:
    """Whether the pass that runs is the one without the prompt."""
    try:
        from sglang.multimodal_gen.runtime.managers.forward_context import (  # type: ignore[import-not-found]
            get_forward_context,
        )

        return bool(get_forward_context().forward_batch.is_cfg_negative)
    except Exception:  # a pass outside of SGLang's context: a single one
        return False


def ranks() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    try:
        from sglang.multimodal_gen.runtime.distributed.parallel_state import (  # type: ignore[import-not-found]
            get_world_rank,
            get_world_size,
        )

        return int(get_world_rank()), int(get_world_size())
    except Exception:  # no group of processes has been formed
        return 0, 1


@contextmanager
def recorded(folder: Path, number: int, rank: int, world: int) -> Iterator[None]:
    """A recording of the block, in a file of its own. What cannot be written is logged."""
    from ...recording import record

    with record() as recording:
        if world > 1:
            recording.meta["rank"] = rank
        try:
            yield
        finally:
            recording.stop()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                recording.save(folder / f"request{number}-rank{rank}-pid{os.getpid()}.json")
            except Exception as error:
                log.warning("request %d was not recorded: %s", number, str(error))
