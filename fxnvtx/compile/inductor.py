"""Ranges in the Python code that Inductor generates around its kernels. All that depends on torch's version is here.

How: Inductor's wrapper writes lines, one list per generated function. Where a line launches something, a line that
moves this call's cursor to the launch's owner is put before it. The function's body goes into one `try`, whose
`finally` closes what is open. The kernels are not touched; where nobody listens, the lines cost an `is None` test each.

Which launch belongs to whom: provenance.py.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .owners import owners_of
from .provenance import FLOW, LAUNCHING, Compilation, attributed
from .work import Work, summed

__all__ = ["Compilation", "compile_graph", "compile_plain", "config_of", "missing", "why_no_ranges"]


class _Active(threading.local):
    compilation: Compilation | None = None


_active = _Active()
_ANY = object()  # the owner of the last launch where control flow makes it one of several


@functools.cache
def missing() -> str | None:
    """What this torch lacks for ranges around kernels; None where everything fits."""
    try:
        from torch._inductor import config, debug
        from torch._inductor.codegen import wrapper
        from torch._inductor.custom_graph_pass import CustomGraphPass
        from torch._inductor.graph import GraphLowering
        from torch._inductor.virtualized import V
    except ImportError as error:
        return str(error)
    needed: list[tuple[Any, str]] = [
        (config.trace, "provenance_tracking_level"),
        (config, "post_grad_custom_post_pass"),
        (debug, "set_kernel_post_grad_provenance_tracing"),
        (CustomGraphPass, "uuid"),
        (GraphLowering, "init_wrapper_code"),
        (GraphLowering, "run"),
        (V, "graph"),
        (wrapper, "WrapperLine"),
        *((wrapper, name) for name in LAUNCHING if name in ("KernelCallLine", "ExternKernelAllocLine")),
        *(
            (wrapper.PythonWrapperCodegen, name)
            for name in (
                "writeline",
                "run_wrapper_ir_passes",
                "generate_return",
                "get_graph_input_names",
            )
        ),
    ]
    for owner, name in needed:
        if name != "graph" and not hasattr(owner, name):
            return f"{getattr(owner, '__name__', owner)}.{name}"
    return None


@functools.cache
def _patch_graph_lowering() -> None:
    """Let every wrapper that Inductor makes for one of our compilations write ranges. Others pass through untouched:
    the decision is made per thread, and other threads may be compiling without us."""
    from torch._inductor.graph import GraphLowering

    original = GraphLowering.init_wrapper_code

    @functools.wraps(original)
    def init_wrapper_code(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        compilation = _active.compilation
        in_python = not getattr(self, "cpp_wrapper", False) and not getattr(self, "fx_wrapper", False)
        if compilation is not None and in_python:
            wrapper = self.wrapper_code
            base: Any = type(wrapper)
            wrapper.__class__ = _with_ranges(base)
            wrapper.fxnvtx_start(compilation)
        return result

    GraphLowering.init_wrapper_code = init_wrapper_code  # type: ignore[method-assign]
    _patch_provenance()


def _patch_provenance() -> None:
    """Inductor says of which scheduler nodes a kernel is made, and keeps the names of their origins if it is asked to.
    Keep the nodes. Modules that import the function when they are loaded hold it by name.

    The passes must keep track of which node replaced which (provenance_tracking_level 1), but under that level some
    kernels are named differently (the choices of max-autotune that are graphs): it ends where lowering begins."""
    from torch._inductor import config, debug
    from torch._inductor.graph import GraphLowering
    from torch.fx.traceback import preserve_node_meta

    original = debug.set_kernel_post_grad_provenance_tracing
    original_run = GraphLowering.run

    @functools.wraps(original)
    def set_kernel_post_grad_provenance_tracing(node_schedule: Any, kernel_name: Any, *args: Any, **kwargs: Any) -> Any:
        compilation = _active.compilation
        if compilation is not None and isinstance(node_schedule, (list, tuple)):
            compilation.announced = (kernel_name, list(node_schedule))
        return original(node_schedule, kernel_name, *args, **kwargs)

    @functools.wraps(original_run)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _active.compilation is None:
            return original_run(self, *args, **kwargs)
        level = _active.compilation.provenance_level
        config.trace.provenance_tracking_level = level  # compile_fx takes its patches back when this graph is compiled
        with preserve_node_meta(level == 1):
            return original_run(self, *args, **kwargs)

    GraphLowering.run = run  # type: ignore[method-assign]
    for name, module in list(sys.modules.items()):
        if name.startswith("torch._inductor") and vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, set_kernel_post_grad_provenance_tracing)


@contextmanager
def _compiling(compilation: Compilation, backward: bool) -> Iterator[None]:
    before = _active.compilation
    compilation.backward = backward
    _active.compilation = compilation
    try:
        yield
    finally:
        _active.compilation = before


_IMPORT = "import fxnvtx.ranges.emit as _fxnvtx_emit"  # in every generated wrapper


@functools.cache
def _cache_pass() -> Any:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class CacheKey(CustomGraphPass):
        """Changes nothing. Its uuid keeps cache entries with ranges apart from those without, and from those whose
        kernels are the same but whose owners are called differently, or whose code asks another version of fxnvtx."""

        def __init__(self, key: str, inner: Any) -> None:
            self.key = key
            self.inner = inner

        def __call__(self, graph: Any) -> None:
            for custom in _as_tuple(self.inner):
                custom(graph)

        def uuid(self) -> Any:
            inner = []
            for custom in _as_tuple(self.inner):
                theirs = custom.uuid() if hasattr(custom, "uuid") else None
                if theirs is None:
                    return None
                inner.append(theirs)
            return ("fxnvtx", _IMPORT, self.key, *inner)

    return CacheKey


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def config_of(mode: str | None, options: Any) -> dict[str, Any]:
    """Inductor's config patches for torch.compile's `mode` and `options`, checked as torch.compile checks them."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def why_no_ranges(config_patches: dict[str, Any]) -> str | None:
    """Why Inductor's generated code cannot have ranges under this configuration; None where it can."""
    lacking = missing()
    if lacking is not None:
        return f"this torch ({torch.__version__}) has no {lacking}"
    from torch._inductor import config

    for name, what in (("cpp_wrapper", "a C++ wrapper"), ("fx_wrapper", "an FX wrapper")):
        if config_patches.get(name, getattr(config, name, False)):
            return f"Inductor generates {what} ({name}), in which there is no place for ranges"
    from torch._inductor import compile_fx

    mode = getattr(getattr(compile_fx, "fx_compile_mode", None), "name", "NORMAL")
    if mode != "NORMAL":
        return f"Inductor compiles in another process (fx_compile_mode {mode})"
    return None


def replays(config_patches: dict[str, Any]) -> bool:
    """Whether CUDA graphs may run a region without its generated code."""
    from torch._inductor import config

    return bool(config_patches.get("triton.cudagraphs", config.triton.cudagraphs))


def compile_plain(graph_module: Any, example_inputs: Any, config_patches: dict[str, Any]) -> Callable[..., Any]:
    """Inductor without us."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, example_inputs, config_patches=config_patches)  # type: ignore[return-value]


def compile_graph(
    graph_module: Any, example_inputs: Any, config_patches: dict[str, Any], compilation: Compilation
) -> Callable[..., Any]:
    """Inductor's own compile_fx, with ranges in what it generates."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    _patch_graph_lowering()

    def inner_compile(graph: Any, inputs: Any, **kwargs: Any) -> Any:
        compilation.look_at(graph.graph, kwargs.get("static_input_idxs") or ())
        try:
            with _compiling(compilation, bool(kwargs.get("is_backward"))):
                return compile_fx_inner(graph, inputs, **kwargs)
        finally:
            compilation.forget()

    theirs = config_patches.get("post_grad_custom_post_pass", config.post_grad_custom_post_pass)
    level = config_patches.get("trace.provenance_tracking_level", config.trace.provenance_tracking_level)
    compilation.provenance_level = level
    patches = {
        **config_patches,
        "trace.provenance_tracking_level": 1,  # the passes know this level and no other
        "post_grad_custom_post_pass": _cache_pass()(compilation.cache_key, theirs),
    }
    return compile_fx(graph_module, example_inputs, inner_compile=inner_compile, config_patches=patches)  # type: ignore[return-value]


@functools.cache
def _lines() -> tuple[type, type, type]:
    """The three lines we add. Made late: their base class lives in torch."""
    from torch._inductor.codegen.wrapper import WrapperLine

    class BeginLine(WrapperLine):
        def __init__(self, name: str, tensors: list[str], wrapper: Any) -> None:
            self.name = name
            self.tensors = tensors
            self.wrapper = wrapper

        def codegen(self, code: Any) -> None:
            tensors = ", ".join(self.tensors)
            self.wrapper.fxnvtx_level = code._indent  # torch 2.11 to 2.15
            code.writeline(f"_fxnvtx_at = {self.name}.enter({tensors}) if _fxnvtx_emit.active else None")
            code.writeline("try:")
            code.do_indent()
            code.writeline("pass")

        def codegen_fx(self, converter: Any) -> Any:
            return lambda line: None

    class OwnerLine(WrapperLine):
        def __init__(self, row: int, shapes: int) -> None:
            self.row = row
            self.shapes = shapes

        def codegen(self, code: Any) -> None:
            code.writeline(f"if _fxnvtx_at is not None: _fxnvtx_at({self.row}, {self.shapes})")

        def codegen_fx(self, converter: Any) -> Any:
            return lambda line: None

    return BeginLine, OwnerLine, WrapperLine


@functools.cache
def _with_ranges(base: Any) -> Any:
    """The wrapper class `base`, writing ranges."""
    begin_line, owner_line, wrapper_line = _lines()

    def fxnvtx_start(self: Any, compilation: Compilation) -> None:
        self.fxnvtx = compilation
        self.fxnvtx_backward = compilation.backward
        self.fxnvtx_rows = {}
        self.fxnvtx_shapes = []
        self.fxnvtx_work = []  # for each time that the code moves to an owner, its row and what is launched there
        self.fxnvtx_branches = False
        self.fxnvtx_calling = False
        self.fxnvtx_here = None
        self.fxnvtx_ready = True

    def writeline(self: Any, line: Any) -> None:
        if _active.compilation is not None and not self.fxnvtx_calling:
            launch = attributed(self, line, wrapper_line)
            if launch is not None and launch.row != self.fxnvtx_here:
                self.fxnvtx_here = launch.row
                number = self.fxnvtx_rows.setdefault(launch.row, len(self.fxnvtx_rows) + 1)
                if launch.shapes not in self.fxnvtx_shapes:
                    self.fxnvtx_shapes.append(launch.shapes)
                base.writeline(self, owner_line(number, self.fxnvtx_shapes.index(launch.shapes)))
                self.fxnvtx_work.append((number, []))
            if launch is not None:
                self.fxnvtx_work[-1][1].append(launch.work)
            if type(line).__name__ in FLOW:
                self.fxnvtx_here = _ANY
                self.fxnvtx_branches = True
        base.writeline(self, line)

    def run_wrapper_ir_passes(self: Any, is_inference: bool) -> None:
        base.run_wrapper_ir_passes(self, is_inference)
        name = f"_fxnvtx_{self.launcher_fn_name}"
        rows = [owners_of(row) for row in self.fxnvtx_rows]
        self.header.writeline(_IMPORT)
        self.header.writeline("from fxnvtx.compile.runtime import Table as _fxnvtx_Table")
        below = hasattr(self, "subgraph_name") and getattr(self, "partition_signatures", None) is None
        work = _work_of(self)
        arguments = f"{self.fxnvtx.key!r}, {self.fxnvtx_backward}, {rows!r}, {self.fxnvtx_shapes!r}, {below}, {work!r}"
        self.header.writeline(f"{name} = _fxnvtx_Table({arguments})")
        self.lines.insert(0, begin_line(name, _telling(self, below), self))

    def generate_return(self: Any, output_refs: list[str]) -> None:
        base.generate_return(self, output_refs)
        # Back to where `try` stands: code for several streams leaves its blocks open at the end.
        self.wrapper_call.do_unindent(self.wrapper_call._indent - self.fxnvtx_level)
        self.wrapper_call.writeline("finally:")
        self.wrapper_call.do_indent()
        self.wrapper_call.writeline("if _fxnvtx_at is not None: _fxnvtx_at.close()")

    methods = {f.__name__: f for f in (fxnvtx_start, writeline, run_wrapper_ir_passes, generate_return)}
    for name in ("codegen_partition_call", "codegen_subgraph_call", "codegen_subgraph_call_with_flattened_outputs"):
        if hasattr(base, name):
            methods[name] = _calling_below(base, name, owner_line)
    return type(f"{base.__name__}WithRanges", (base,), methods)


def _work_of(wrapper: Any) -> list[tuple[Any, ...]]:
    """(row, flops, bytes, why unknown) of every segment, as a literal. Where branches are in the same code, which of
    it runs how often is not known."""
    found = [(row, *summed(works)) for row, works in wrapper.fxnvtx_work]
    if wrapper.fxnvtx_branches:
        return [(row, *Work(unknown="control flow")) for row, *_ in found]
    return found


def _telling(wrapper: Any, below: bool) -> list[str]:
    """Arguments that may be parameters and so tell which block this call is for: those of a subgraph, which may serve
    several, and of a backward, whose forward call may not have been seen."""
    names = list(wrapper.get_graph_input_names())
    if below:
        return names
    return [n for n in names if n.startswith("primals_")] if wrapper.fxnvtx_backward else []


def _calling_below(base: Any, name: str, owner_line: Any) -> Any:
    """A function below (a subgraph's, a partition's) opens its own ranges, from the region's range on."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _to_base(self, owner_line, base)
        self.fxnvtx_calling = True
        try:
            return getattr(base, name)(self, *args, **kwargs)
        finally:
            self.fxnvtx_calling = False

    return call


def _to_base(wrapper: Any, owner_line: Any, base: Any) -> None:
    if wrapper.fxnvtx_here is not None:
        wrapper.fxnvtx_here = None
        base.writeline(wrapper, owner_line(0, -1))
