"""ComponentResidencyManager: one timeline of component uses per request, weights and ranges that follow it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import PipelineError
from ..modules import Attachments
from ..modules.selection import unwrapped
from .args import ServerArgs
from .component_use import Active, ComponentUse, Holdings, Request, Requests, Timeline, UsesComponents, uses_of
from .memory import ByteAccount, Place

__all__ = ["ComponentResidencyManager"]


class ComponentResidencyManager:
    """Brings a component's weights in before a use, lets them go after, and has it instrumented exactly meanwhile.

    `components` is read anew at every use: put another module into it and the next use takes that one. `kinds`: dit,
    vae, text_encoder, image_encoder or other, by component name.

    What a request has come to is kept in the request that `begin_request` returns. The other methods find it by the
    context they are called in; elsewhere (a thread that began none) the one request there is is meant, or `request`
    says which. It may be finished on any thread. A request that begins on a thread which had no part in those under
    way waits until they are done: weights that move block by block cannot serve two threads at once.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        kinds: Mapping[str, str] | None = None,
        args: ServerArgs | None = None,
        place: Place | None = None,
    ) -> None:
        self.components = components
        self.kinds = kinds if kinds is not None else {}
        self.args = args or ServerArgs()
        self.attachments = Attachments()
        self.holdings = Holdings(self.kinds, self._args_here, place, self._in_use, self._shows_moves)
        self._seen: dict[str, weakref.ref[nn.Module]] = {}
        self._requests = Requests()
        self._lock = self._requests.lock

    # ------------------------------------------------------------------------------------------------- requests

    def begin_request(
        self,
        stages: Iterable[UsesComponents],
        args: ServerArgs,
        *,
        is_warmup: bool = False,
        use_nvtx: bool | None = None,
    ) -> Request:
        """Lay out the uses of `stages` and put every component where it is to wait for its first. Returns the request.

        `use_nvtx`: the executor's decision about ranges; without one, the flags and `is_warmup` decide.
        """
        with self._lock:
            self._requests.wait_for_turn()
            wanted = args.stage_ranges and not is_warmup if use_nvtx is None else use_nvtx
            uses = uses_of(stages, args)
            for use in uses:
                self._module(use.component)
            request = Request(args, wanted, Timeline(uses), windows=args.step_windows())
            previous, self.args = self.args, args
            self._requests.begin(request)
            try:
                self.refresh_pipeline()
            except BaseException:
                self.args = previous
                self._requests.leave(request)
                raise
            if len(self._requests) == 1:
                self.account.reset_peak()
            return request

    def before_stage(self, stage: UsesComponents, *, request: Request | None = None) -> None:
        """From now on uses belong to `stage`."""
        with self._lock:
            request = self._requests.require(request)
            request.stage = stage.component_name
            request.timeline.stage_begins(stage.component_name)

    @contextmanager
    def stage_uses(self, stage: UsesComponents) -> Iterator[None]:
        """The uses of `stage` that begin at its entry, for the length of a block. Does nothing without a request."""
        with ExitStack() as stack:
            if self.in_request:
                for use in self._requests.require().timeline.of(stage.component_name):
                    if use.at_stage_entry:
                        stack.enter_context(self.use_component(use))
            yield

    def finish_request(self, request: Request | None = None) -> None:
        """End every use that is left, drop what was prefetched in vain. Does nothing without a request."""
        with self._lock:
            if request is None and not self._requests:
                return
            request = self._requests.require(request)
            try:
                self._finish_down_to(request, 0)
                if len(self._requests) == 1:
                    for module, strategy in self.holdings.known():
                        strategy.finish_request(module)
            finally:
                self._requests.leave(request)

    def refresh_pipeline(self, components: Mapping[str, nn.Module] | None = None) -> None:
        """Take the components as they are now: replaced ones are let go, new ones are placed.

        Weights of a component that is not in use go where its residency mode wants them between uses.
        """
        with self._lock:
            if components is not None:
                self.components = components
            for name in [n for n in self._seen if n not in self.components]:
                self._forget(name)
            for name in self.components:
                module = self._module(name)
                if isinstance(module, nn.Module) and not self._in_use(module):
                    strategy = self.holdings.strategy(name, module)
                    strategy.refresh(unwrapped(module))
                    if not strategy.kept:
                        strategy.finish_use(unwrapped(module))

    # ----------------------------------------------------------------------------------------------------- uses

    def begin_use(
        self,
        component: str | ComponentUse,
        phase: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        request: Request | None = None,
    ) -> nn.Module:
        """Begin a use, ending the one that `begin_use` began before it; returns the module, ready.

        The same use again goes on; with another module object or dtype it is prepared again.
        """
        with self._lock:
            request = self._requests.require(request)
            use = request.declared(component, phase, dtype)
            module = self._module(use.component) if module is None else module
            last = request.active[-1] if request.active else None
            if last is not None and not last.scoped:
                if last.use == use and last.module is module:
                    return module
                self._finish(last)
            self._begin(request, use, module, scoped=False)
            return module

    def end_use(
        self, component: str | ComponentUse, phase: str | None = None, *, request: Request | None = None
    ) -> None:
        """End a use that `begin_use` began. Does nothing where it has ended already."""
        with self._lock:
            request = self._requests.require(request)
            use = request.declared(component, phase)
            last = request.active[-1] if request.active else None
            if last is not None and not last.scoped and last.use.key == use.key:
                self._finish(last)
                self._prefetch_next(request)

    @contextmanager
    def use_component(
        self,
        component: str | ComponentUse,
        phase: str | None = None,
        *,
        dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        request: Request | None = None,
    ) -> Iterator[nn.Module]:
        """A use for the length of a block. Nests: the outer use is what it was when the block ends."""
        with self._lock:
            request = self._requests.require(request)
            use = request.declared(component, phase, dtype)
            module = self._module(use.component) if module is None else module
            active = self._begin(request, use, module, scoped=True)
        try:
            yield module
        finally:
            with self._lock:
                if active in request.active:
                    self._finish_down_to(request, request.active.index(active))
        with self._lock:
            self._prefetch_next(request)

    def update_component(self, component: str, change: Callable[[nn.Module], None]) -> None:
        """Change a component's weights (a LoRA switch, a weight update): `change` is called on the module, or on
        one part of it after the other where only parts may be in memory, and what it changes is kept."""
        with self._lock:
            module = self._module(component)
            strategy = self.holdings.strategy(component, module)
            strategy.refresh(unwrapped(module))
            if not self._in_use(module):
                self.holdings.make_room(strategy, self.components)
            with torch.no_grad():
                strategy.update(unwrapped(module), change, self._in_use(module))

    # ---------------------------------------------------------------------------------------------- instrumentation

    def attach_ahead(self, stages: Iterable[UsesComponents], args: ServerArgs) -> None:
        """Instrument the components of a request before it begins, switched off: reading a large model takes tens of
        milliseconds, which would otherwise show as a stage's own."""
        with self._lock:
            met: set[str] = set()
            for use in uses_of(stages, args):
                module = self._module(use.component)
                if use.component not in met and isinstance(module, nn.Module) and not self._in_use(module):
                    self.attachments.enable(module, use.prefix, args.nvtx_depth, shapes=args.nvtx_shapes)
                    self.attachments.disable(module)
                met.add(use.component)

    def remove_nvtx_hooks_for_module(self, module: nn.Module) -> None:
        """Leave no trace of instrumentation in `module`, in the middle of its use too."""
        with self._lock:
            for request in self._requests:
                for active in request.active:
                    if active.module is module:
                        active.ranged = False
            self.attachments.remove(module)

    def show_step(self, index: int, *, request: Request | None = None) -> None:
        """Step `index` of a loop begins: show its layers where the arguments ask for that step."""
        request = self._requests.require(request)
        self.show_layers(index in request.windows, request=request)

    def show_layers(self, enabled: bool, *, request: Request | None = None) -> None:
        """Layer ranges on or off for the components in use, from their next call on: for windows of steps."""
        with self._lock:
            request = self._requests.require(request)
            if request.layers != enabled:
                request.layers = enabled
                for active in request.active:
                    if active.ranged:
                        self.attachments.switch(active.module, enabled)

    def _enable_nvtx_for_use(self, request: Request, active: Active) -> None:
        if not isinstance(active.module, nn.Module):
            return
        if not (request.args.enable_layerwise_nvtx_marker and request.use_nvtx):
            self.attachments.silence(active.module, active.use.prefix)
            return
        args = request.args
        self.attachments.enable(
            active.module, active.use.prefix, args.nvtx_depth, request.layers, shapes=args.nvtx_shapes
        )
        active.ranged = True

    def _disable_active_nvtx(self, active: Active) -> None:
        if active.ranged:
            active.ranged = False
            self.attachments.disable(active.module)

    # ------------------------------------------------------------------------------------------------------ state

    @property
    def account(self) -> ByteAccount:
        """How many weight bytes are in compute memory."""
        return self.holdings.account

    @property
    def current_stage_name(self) -> str | None:
        """The stage that the request of this context has come to."""
        request = self._requests.current()
        return request.stage if request is not None else None

    @property
    def in_request(self) -> bool:
        """Whether a request is under way that this context belongs to, or may belong to."""
        return len(self._requests) > 0

    @property
    def bound_bytes(self) -> int:
        """What resident weight bytes stay under, as long as uses do not nest: the components that stay, and the
        largest one (for layer-wise offloading: two blocks and what lies outside the blocks) of those that do not."""
        with self._lock:
            return self.holdings.bound_bytes({name: self._module(name) for name in self.components})

    def bring_back(self, component: str) -> None:
        """Put all weights of a component into compute memory and take no further part in where they are."""
        with self._lock:
            self.holdings.bring_back(self._module(component))

    # --------------------------------------------------------------------------------------------------- details

    def _begin(self, request: Request, use: ComponentUse, module: nn.Module, *, scoped: bool) -> Active:
        self.holdings.load(use, module, self.components)
        active = Active(use, module, scoped)
        request.active.append(active)
        request.timeline.begins(use)
        self._take_over(request, use, module)
        try:
            self._enable_nvtx_for_use(request, active)
            self._prefetch_next(request)
        except BaseException:
            self._finish(active)
            raise
        return active

    def _take_over(self, request: Request, use: ComponentUse, module: Any) -> None:
        """Another module object under the same key: what the old one carries goes now, not when a request ends."""
        known = request.last_module.get(use.key)
        old = known() if known is not None else None
        if old is not None and old is not module and not self._in_use(old):
            self.attachments.remove(old)
        if isinstance(module, nn.Module):
            request.last_module[use.key] = weakref.ref(module)

    def _finish_down_to(self, request: Request, depth: int) -> None:
        """End the innermost uses until `depth` are left: all of them, whatever fails. Raises the first failure."""
        failure: BaseException | None = None
        while len(request.active) > depth:
            try:
                self._finish(request.active[-1])
            except BaseException as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _finish(self, active: Active) -> None:
        """End one use: its ranges first, then its weights; an outer use of the same module gets both back."""
        request = next(r for r in self._requests if active in r.active)
        self._disable_active_nvtx(active)
        request.active.remove(active)
        if not request.active:
            request.layers = True  # a window of steps ends with the loop's use
        module = active.module
        if not isinstance(module, nn.Module):
            return
        seen = self._seen.get(active.use.component)
        if seen is not None and seen() is not module and not self._in_use(module):
            self.attachments.remove(module)  # it was replaced while it was in use
        outer = next(((r, a) for r in reversed(self._requests) for a in reversed(r.active) if a.module is module), None)
        strategy = self.holdings.of(module)
        if outer is None:
            if strategy is not None and not strategy.kept:
                strategy.finish_use(unwrapped(module))
            return
        if strategy is not None and outer[1].use.dtype != active.use.dtype:
            strategy.wait_for_use(unwrapped(module), outer[1].use.dtype)
        self._enable_nvtx_for_use(*outer)

    def _prefetch_next(self, request: Request) -> None:
        use = request.timeline.next_heavy()
        if use is None or not use.prefetch:
            return
        module = self._module(use.component)
        if self._in_use(module) or not isinstance(module, nn.Module):
            return
        strategy = self.holdings.strategy(use.component, module)
        self.holdings.prefetch(strategy, module, use.dtype, self.components)

    def _module(self, name: str) -> Any:
        try:
            module = self.components[name]
        except KeyError:
            known = ", ".join(self.components) or "none"
            raise PipelineError(f"there is no component {name!r}; the pipeline has {known}") from None
        if not isinstance(module, nn.Module):
            return module
        seen = self._seen.get(name)
        if seen is None or seen() is not module:
            self._forget(name)
            self._seen[name] = weakref.ref(module)
        return module

    def _forget(self, name: str) -> None:
        """A component was replaced or left the pipeline: it gets its weights' ranges and hooks taken out."""
        ref = self._seen.pop(name, None)
        old = ref() if ref is not None else None
        if old is not None and not self._in_use(old):
            self.attachments.remove(old)

    def _in_use(self, module: Any) -> bool:
        return any(
            a.module is module or (isinstance(a.module, nn.Module) and unwrapped(a.module) is module)
            for r in self._requests
            for a in r.active
        )

    def _args_here(self) -> ServerArgs:
        request = self._requests.current()
        return self.args if request is None else request.args

    def _shows_moves(self) -> bool:
        """Whether weights that move now show it: as the request wants for which they move."""
        request = self._requests.current()
        return request is not None and request.use_nvtx
