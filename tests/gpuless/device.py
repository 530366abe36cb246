"""An H100 that is not there: Inductor generates its real Triton kernels and its wrapper for CUDA, without a driver.

Dynamo, AOTAutograd, guards and parameters are the real thing, on CPU tensors. At Inductor's door every fake tensor is
told that it lives on cuda:0; what Inductor asks CUDA and Triton's driver is answered here. The generated wrapper then
runs on the CPU tensors: library calls compute; Triton kernels run in Triton's interpreter (`interpreted`, set before
triton is imported) or are stand-ins that do nothing but be launched.

For a process of its own: nothing here is ever undone.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree

CUDA = torch.device("cuda", 0)
HOPPER = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=80 << 30,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
    uuid="0",
)


class StandIn:
    """A Triton kernel that is launched and computes nothing."""

    __module__ = "torch._inductor.runtime.triton_heuristics"  # where the witness looks for kernels

    fn = types.SimpleNamespace(arg_names=(), constexprs=())
    inductor_meta: dict[str, Any] = {}

    def __init__(self, name: str, source: str) -> None:
        self.kernel_name = name
        self.source = source

    def run(self, *args: Any, stream: Any = None, **kwargs: Any) -> None:
        pass


class Stream:
    """CUDA's current stream."""

    def __init__(self, number: int = 0) -> None:
        self.cuda_stream = self.stream_id = number
        self.device, self.device_index = CUDA, 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *reason: Any) -> None:
        pass


def _answers() -> dict[str, Callable[..., Any]]:
    """What torch.cuda and Dynamo's interface to it are asked. A function each: Dynamo tells functions apart."""
    return {
        "get_device_properties": lambda *a: HOPPER,
        "get_device_capability": lambda *a: (HOPPER.major, HOPPER.minor),
        "get_device_name": lambda *a: HOPPER.name,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
        "set_device": lambda *a: None,
        "synchronize": lambda *a: None,
        "current_stream": lambda *a: Stream(),
        "is_bf16_supported": lambda *a, **k: True,
    }


def _install_cuda() -> None:
    from torch._dynamo import device_interface

    interface: Any = device_interface.CudaInterface
    for name, answer in _answers().items():
        setattr(torch.cuda, name, answer)
        if hasattr(interface, name):
            setattr(interface, name, staticmethod(answer))
    interface.is_available = staticmethod(lambda: True)
    objects = getattr(torch._dynamo, "graph_bytecode_inputs", None)
    streams: Any = getattr(torch._dynamo.variables, "streams", None)
    if objects is not None:  # torch 2.12 to 2.15: streams of the model's own, by number
        objects.get_external_object_by_index = Stream
    if hasattr(streams, "_get_stream_by_index"):  # torch 2.14 and 2.15
        streams._get_stream_by_index = Stream
    interface.get_raw_stream = staticmethod(lambda *a: 0)
    interface.Worker.get_device_properties = staticmethod(lambda *a: HOPPER)
    interface.Worker.current_device = staticmethod(lambda: 0)
    private: Any = torch._C
    private._cuda_getCurrentRawStream = lambda *a: 0
    guards = private._dynamo.guards
    guards._empty_strided_cuda = functools.partial(_called, guards._empty_strided_cpu)
    cuda: Any = torch.cuda
    cuda._DeviceGuard = contextlib.nullcontext
    select = getattr(private, "_select_conv_backend", None)
    if select is not None:
        private._select_conv_backend = functools.partial(_convolution_backend, select)


def _called(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _convolution_backend(select: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Asking a build without CUDA which library it would take raises; cuDNN it would be."""
    try:
        return select(*args, **kwargs)
    except RuntimeError:
        return torch._C._ConvBackend.Cudnn  # type: ignore[attr-defined]


def _install_triton() -> None:
    from torch._inductor.runtime import triton_helpers
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver as drivers

    limits = {"max_shared_mem": HOPPER.shared_memory_per_block_optin, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        """Triton's view of the device."""

        utils = types.SimpleNamespace(get_device_properties=lambda *a: limits)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda *a: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_device_interface = staticmethod(lambda: torch.cuda)
        set_current_device = staticmethod(lambda *a: None)

    driver: Any = drivers.driver if hasattr(drivers, "driver") else drivers
    driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda *a: None
    has_triton = _triton.has_triton
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.startswith("torch.") and vars(module).get("has_triton") is has_triton:
            module.has_triton = lambda *a, **k: True  # type: ignore[attr-defined]


def _onto_device(value: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    def one(leaf: Any) -> Any:
        if isinstance(leaf, FakeTensor) and leaf.fake_device.type == "cpu":
            leaf.fake_device = CUDA
        return leaf

    return pytree.tree_map(one, value)


_COPIES = {"fxnvtx_gpuless.to_host": torch.device("cpu"), "fxnvtx_gpuless.to_device": CUDA}


def _move(graph_module: torch.fx.GraphModule) -> None:
    """All that Inductor will look at. What stands for a copy to another device becomes one."""

    def other(argument: Any) -> Any:
        return CUDA if isinstance(argument, torch.device) and argument.type == "cpu" else argument

    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in list(module.graph.nodes):
                if _is_constant(node):
                    _sent(module.graph, node)
                    continue
                for key in ("val", "example_value", "eager_input_vals"):
                    if key in node.meta:
                        _onto_device(node.meta[key])
                node.args = torch.fx.node.map_aggregate(node.args, other)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, other)
                target = _COPIES.get(str(node.target).removesuffix(".default"))
                if target is not None:
                    node.target = torch.ops.prims.device_put.default
                    node.args = (node.args[0], target)
                    node.meta["val"].fake_device = target
            module.recompile()


def _is_constant(node: torch.fx.Node) -> bool:
    """A tensor made from numbers: the real one is on the host."""
    source = node.all_input_nodes[:1]
    return node.target is torch.ops.aten.lift_fresh_copy.default and source[0].op == "get_attr"


def _sent(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    """To the device, as torch.tensor(numbers, device="cuda") does it."""
    with graph.inserting_after(node):
        copy = graph.call_function(torch.ops.prims.device_put.default, (node, CUDA))
    copy.meta = dict(node.meta)
    copy.meta["val"] = _onto_device(node.meta["val"].clone())
    node.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def _scattered(original: Callable[..., Any], into: Any, source: Any, views: Any) -> Any:
    """Writing to a fake tensor of CUDA's asks a build without CUDA for its device guard."""
    from torch._subclasses.fake_tensor import FakeTensor

    fakes = [t for t in (into, source) if isinstance(t, FakeTensor)]
    devices = [t.fake_device for t in fakes]
    for fake in fakes:
        fake.fake_device = torch.device("cpu")
    try:
        result = original(into, source, views)
    finally:
        for fake, device in zip(fakes, devices, strict=True):
            fake.fake_device = device
    return _onto_device(result) if CUDA in devices else result


class _LibDevice:
    """CUDA's mathematical functions, for Triton's interpreter."""

    NAMES = {"nearbyint": "round"}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(torch, self.NAMES.get(name, name))

        def call(*args: Any) -> Any:
            import numpy
            from triton.language.core import tensor
            from triton.runtime.interpreter import TensorHandle

            values = [torch.from_numpy(numpy.ascontiguousarray(a.handle.data)) for a in args]
            return tensor(TensorHandle(function(*values).numpy(), args[0].handle.dtype), args[0].type)

        return call


def _multiply_into_another_type() -> None:
    """A product with a type of its own for the result, which only CUDA has (torch 2.11 to 2.15, where it is used)."""
    import torch._inductor.kernel.mm
    from torch._inductor.select_algorithm import extern_kernels

    def bmm_dtype(a: torch.Tensor, b: torch.Tensor, *dtype: Any, out: torch.Tensor, **more: Any) -> torch.Tensor:
        return out.copy_(torch.bmm(a, b))

    if hasattr(extern_kernels, "bmm_dtype"):
        extern_kernels.bmm_dtype = bmm_dtype


def install(interpreted: bool = False) -> None:
    """Put the device in place, once and for all of this process."""
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch._inductor.codegen.triton
    import torch._inductor.graph
    import torch._inductor.lowering
    import torch._inductor.scheduler
    from torch._inductor import async_compile, compile_fx, config

    _install_cuda()
    _install_triton()
    original = compile_fx._compile_fx_inner

    @functools.wraps(original)
    def inner(graph_module: Any, example_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _move(graph_module)
        _onto_device(list(example_inputs))
        return original(graph_module, example_inputs, *args, **kwargs)

    compile_fx._compile_fx_inner = inner  # type: ignore[assignment]
    from torch._inductor.fx_passes import reinplace

    passes: Any = reinplace
    passes._inplace_generalized_scatter = functools.partial(_scattered, passes._inplace_generalized_scatter)
    if interpreted:
        from torch._inductor.runtime import triton_helpers

        triton_helpers.libdevice = _LibDevice()  # type: ignore[attr-defined]
    else:
        kernels: Any = async_compile.AsyncCompile
        kernels.triton = lambda self, name, source, *a, **k: StandIn(name, source)
        kernels.multi_kernel = lambda self, name, *a, **k: StandIn(name, "")
    _multiply_into_another_type()
    for name, value in (
        ("fx_graph_cache", False),
        ("autotune_local_cache", False),
        ("size_asserts", False),  # strides are CUDA's, what library calls return is the CPU's
        ("alignment_asserts", False),
        ("compile_threads", 1),
    ):
        if hasattr(config, name):
            setattr(config, name, value)
    config.triton.autotune_at_compile_time = False
    torch._functorch.config.enable_autograd_cache = False


@contextlib.contextmanager
def choosing(*wanted: str) -> Iterator[None]:
    """Autotuning without a device: of a matmul's choices the one whose class or name holds the first of these words."""
    from torch._inductor import select_algorithm
    from torch._inductor.codegen import simd
    from torch._inductor.codegen.triton import TritonScheduling

    def times(choices: Any, *args: Any, **kwargs: Any) -> dict[Any, float]:
        texts = {c: f"{type(c).__name__} {c.name}" for c in choices}
        ranks = {c: next((i for i, w in enumerate(wanted) if w in t), 50) for c, t in texts.items()}
        return {c: 0.1 + ranks[c] + 0.001 * i for i, c in enumerate(choices)}

    cache: Any = select_algorithm.AlgorithmSelectorCache
    scheduling: Any = TritonScheduling
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        if hasattr(owner, name):
            own = vars(owner).get(name)
            undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))
            setattr(owner, name, value)

    for name in ("benchmark_choices", "benchmark_in_current_process", "benchmark_in_sub_process"):
        put(cache, name, classmethod(lambda cls, choices, *a, **k: times(list(choices))))
    put(cache, "make_benchmark_fn", classmethod(lambda cls, choices, *a, **k: lambda *x, **y: times(list(choices))))
    put(cache, "benchmark", lambda self, choices, *a, **k: times(choices))
    put(cache, "make_precompile_fn", lambda self, *a, **k: lambda *x, **y: None)
    put(cache, "prescreen_choices", staticmethod(lambda choices, *a, **k: []))
    for kind in (scheduling, simd.SIMDScheduling):
        put(kind, "benchmark_codegened_module", lambda self, *a, **k: (1.0, "x"))
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("torch._inductor"):
            put(module, "is_big_gpu", lambda *a, **k: True)
            if any("decompose" in w for w in wanted):
                put(module, "use_decompose_k_choice", lambda *a, **k: True)
    patch = {"max_autotune": True, "autotune_in_subproc": False, "benchmark_epilogue_fusion": False}
    try:
        with torch._inductor.config.patch({**patch, "max_autotune_gemm_backends": "ATEN,TRITON"}):
            yield
    finally:
        for back in reversed(undo):
            back()


class Graphs:
    """Stands for CUDA-graph trees: what is compiled with CUDA graphs runs once, is recorded once, then replayed."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.generation = 0

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Callable[[list[Any]], Any]:
        runs = 0
        generation = self.generation
        result: Any = None

        def run(inputs: list[Any]) -> Any:
            nonlocal runs, generation, result
            if generation != self.generation:  # its recording was dropped: it is recorded anew
                generation, runs = self.generation, 1
            runs += 1
            self.events.append("run" if runs == 1 else "record" if runs == 2 else "replay")
            if runs <= 2:
                result = model(list(inputs))
            inputs.clear()
            return result

        return run

    @contextlib.contextmanager
    def instead(self) -> Iterator[Graphs]:
        from torch._inductor import compile_fx

        original = compile_fx.cudagraphify
        compile_fx.cudagraphify = self  # type: ignore[assignment]
        try:
            yield self
        finally:
            compile_fx.cudagraphify = original
