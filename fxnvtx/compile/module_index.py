"""While Dynamo hands over a graph: which live modules is it made of?

Dynamo writes down module ids and the source text of how each was reached. The text is unreliable (relative after a
graph break, `__dict__['_modules']` spelled out), so modules are found by identity: below the module whose method is
being compiled, below the instrumented models, below the modules that the frame's variables and globals name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import marshal
import re
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from ..modules.registry import controls
from ..modules.selection import walk_paths
from .labels import named_tensors
from .owners import OWN, Owners, Step, UserRange, stack_of
from .region import Anchor, Region

__all__ = ["current_frame", "digest", "read_graph"]

_RESUMED = re.compile(r"(?:torch_dynamo_resume_in_)+(.*?)(?:_at_\d+)+$")
_LAST_NAME = re.compile(r"([^.\[\]'\"]+)['\"]?\]*$")


class Frame:
    """What Dynamo says about the frame it compiles. All fields may be empty: then only paths remain."""

    def __init__(self, code: types.CodeType | None, variables: Mapping[str, Any], namespace: Mapping[str, Any]) -> None:
        self.code = code
        self.variables = variables
        self.namespace = namespace

    @property
    def name(self) -> str | None:
        if self.code is None:
            return None
        resumed = _RESUMED.match(self.code.co_name)
        return resumed.group(1) if resumed else self.code.co_name

    @property
    def module(self) -> nn.Module | None:
        """The module whose method this is, if it is one."""
        code, name = self.code, self.name
        if code is None or name is None or not code.co_varnames:
            return None
        for variable in ("self", code.co_varnames[0]):
            found = self.variables.get(variable)
            if isinstance(found, nn.Module) and (
                variable == "self" or "forward" in (name, *found.__dict__) or hasattr(type(found), name)
            ):
                return found
        return None

    @property
    def own_code(self) -> bool:
        """Whether the code is the user's, not torch's."""
        return self.code is not None and "/torch/" not in self.code.co_filename.replace("\\", "/")

    def modules(self) -> Iterator[nn.Module]:
        """Modules that the frame's code can name."""
        names = self.code.co_names if self.code is not None else ()
        for value in (*self.variables.values(), *(self.namespace.get(n) for n in names)):
            if isinstance(value, types.FunctionType):
                cells = [c.cell_contents for c in value.__closure__ or () if _filled(c)]
                reachable = [*cells, *(value.__globals__.get(n) for n in value.__code__.co_names)]
            else:
                reachable = [value, *(value if isinstance(value, (list, tuple)) else ())]
                reachable += [getattr(value, "__self__", None)]
            yield from (v for v in reachable if isinstance(v, nn.Module))


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def current_frame() -> Frame:
    """The frame that Dynamo is compiling on this thread, as far as this torch tells."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        root = InstructionTranslator.current_tx().output.root_tx
        return Frame(root.f_code, root.f_locals, root.f_globals)
    except (ImportError, AttributeError):
        return Frame(None, {}, {})


class ModuleIndex:
    """Module stack entries -> steps. Anchors are found as they are met."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.anchors: list[Anchor] = []
        self._below: list[dict[int, list[str]]] = []  # per anchor: id(module) -> its paths below the anchor
        self._steps: dict[tuple[str, str], Step | None] = {}
        module = frame.module
        self.framed = module is not None
        if module is not None:
            self._add(type(module), module)

    def _add(self, kind: type, module: nn.Module | None) -> int:
        below: dict[int, list[str]] = {}
        if module is not None:
            for path, found, _ in walk_paths(module):
                below.setdefault(id(found), []).append(".".join(path))
        self.anchors.append(Anchor(kind, None if module is None else weakref.ref(module)))
        self._below.append(below)
        return len(self.anchors) - 1

    def read(self, node: Node) -> None:
        """Make the steps of one node's stack."""
        above: Step | None = None
        for key, (source, kind) in (stack_of(node) or {}).items():
            step = self._steps.get((key, source))
            if step is None:
                step = self._steps[key, source] = self._make(key, source, kind, above)
            above = step if step is None or step.anchor != OWN else above

    def steps(self) -> list[Step]:
        """All steps met so far."""
        return [s for s in self._steps.values() if s is not None and s.anchor != OWN]

    def step(self, key: str, source: str) -> Step | None:
        return self._steps.get((key, source))

    def _make(self, key: str, source: str, kind: type, above: Step | None) -> Step:
        if kind is UserRange:
            category, _, text = source.partition("\0")
            return Step(OWN, text, category, key)
        number, _, call = key.partition("@")
        hint = _last_name(source)
        if number.isdigit():
            identity = int(number)
            for index, below in enumerate(self._below):
                if identity in below:
                    return Step(index, _pick(below[identity], hint, above, index), hint, call)
            module = self._find(identity)
            if module is not None or above is None:
                return Step(self._add(kind, module), "", hint, call)
        if above is None:
            return Step(self._add(kind, None), "", hint, call)
        # Not a module of anything we hold: only the text tells. Children of an unknown module get here.
        outer = above.path
        return Step(above.anchor, f"{outer}.{hint}" if outer else hint, hint, call)

    def _find(self, identity: int) -> nn.Module | None:
        for model in (*(c.model() for c in reversed(controls())), *self.frame.modules()):
            if model is not None:
                for module in model.modules():
                    if id(module) == identity:
                        return module
        return None


def _last_name(source: str) -> str:
    found = _LAST_NAME.search(source)
    return found.group(1) if found else source


def _pick(paths: list[str], hint: str, above: Step | None, anchor: int) -> str:
    """Of a tied module's paths, the one that continues the path above and ends in the name it was reached by."""
    if above is not None and above.anchor == anchor and above.path:
        inside = [p for p in paths if p.startswith(f"{above.path}.")]
        paths = inside or paths
    named = [p for p in paths if p.rpartition(".")[2] == hint]
    return (named or paths)[0]


def _all_nodes(graph_module: GraphModule) -> Iterator[Node]:
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _operation(node: Node) -> str:
    """A name that is the same in every process (the text of a function has its address in it)."""
    target = node.target
    if isinstance(target, str):
        return target
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__
    return f"{getattr(target, '__module__', '')}.{name}"


@functools.cache
def _writers() -> bytes:
    """What writes into generated code. Another version of it must not find this version's cache entries."""
    found = hashlib.sha256()
    for name in ("inductor", "owners", "provenance", "work"):
        found.update(_written(f"{__package__}.{name}"))
    return found.digest()


def _written(name: str) -> bytes:
    """The text of one of our modules, from a folder or a zip; its bytecode where there is no text."""
    loader: Any = importlib.import_module(name).__spec__.loader  # type: ignore[union-attr]
    source = loader.get_source(name)
    return source.encode() if source is not None else marshal.dumps(loader.get_code(name))


def digest(start: str, graph_module: GraphModule, owners: Owners) -> str:
    """Equal for graphs whose generated code may be shared: the same operations, owned by the same paths."""
    found = hashlib.sha256(_writers() + start.encode())
    for node in _all_nodes(graph_module):
        if node.op not in ("placeholder", "output", "get_attr"):
            found.update(repr((node.op, _operation(node), owners.chains(node))).encode())
    return found.hexdigest()[:32]


def read_graph(graph_module: GraphModule, frame: Frame, tensors: list[Any]) -> tuple[Region, Owners]:
    """What a Dynamo graph is made of. `tensors`: its arguments, parameters and buffers as the real objects."""
    modules = ModuleIndex(frame)
    owners = Owners(modules.step)
    for node in _all_nodes(graph_module):
        if node.op not in ("placeholder", "output", "get_attr"):
            modules.read(node)
            owners.read(node)
    names = _parameter_names(modules)
    for position, tensor in enumerate(tensors):
        for index, found in enumerate(names):
            if id(tensor) in found:
                modules.anchors[index].parameters[position] = found[id(tensor)]
                break
    function = None
    if not modules.framed and frame.own_code and frame.name:
        function = f"{frame.name}()"
    paths = list(dict.fromkeys(s.path or modules.anchors[s.anchor].kind.__name__ for s in modules.steps()))
    modules.frame = Frame(None, {}, {})  # its variables must not live as long as the compiled code
    key = digest("", graph_module, owners)
    part = "" if frame.code is None else frame.code.co_name
    return Region(key, modules.anchors, modules.framed, function, paths, _repeats(graph_module), part), owners


def _repeats(graph_module: GraphModule) -> bool:
    """Whether a subgraph is called at several places, and so has the owners of its first call written down."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            called = [
                n.args[0].target
                for n in module.graph.nodes
                if n.op == "call_function" and n.args and isinstance(n.args[0], Node) and n.args[0].op == "get_attr"
            ]
            if len(set(called)) < len(called):
                return True
    return False


def _parameter_names(modules: ModuleIndex) -> list[dict[int, str]]:
    found: list[dict[int, str]] = []
    for anchor in modules.anchors:
        names: dict[int, str] = {}
        module = anchor.module() if anchor.module is not None else None
        if module is not None:
            for name, tensor in named_tensors(module):
                names.setdefault(id(tensor), name)
        found.append(names)
    return found
