"""The proof that tracing one level bakes nothing in: which forwards may be replaced by a generated one.

`torch.fx` runs a forward once with proxies and writes down what happened. Whatever Python decided on the way (a
branch, a number read from self, a helper function) is frozen without a word. So a level is traced only when its source
is read first and found to be straight-line code over things that either stay symbolic or can be compared again at
every call (`Facts`). Anything else is refused with the reason, and the hooks path takes the level.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Facts", "Refused", "read_forward"]


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """Why a level cannot be traced."""


@dataclass
class Facts:
    """What must still be true at a call for the traced level to be the same function."""

    scalars: dict[str, Any] = field(default_factory=dict)  # attribute of self -> number, string, bool or None
    tensors: set[str] = field(default_factory=set)  # parameters and buffers of self, read anew at each call
    loops: dict[str, tuple[str, ...]] = field(default_factory=dict)  # container attribute ("" is self) -> its keys
    functions: dict[tuple[str, ...], Any] = field(default_factory=dict)  # dotted global name -> the torch object
    called: set[tuple[str, ...]] = field(default_factory=set)  # those of them that are called


_EXPRESSIONS = (
    ast.Name,
    ast.Attribute,
    ast.Call,
    ast.BinOp,
    ast.Subscript,
    ast.Slice,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Constant,
    ast.keyword,
    ast.expr_context,
    ast.operator,
    ast.UAdd,
    ast.USub,
    ast.Invert,
    ast.Load,
)
_SCALARS = (int, float, bool, str, type(None))


def read_forward(module: nn.Module) -> tuple[types.FunctionType, Facts]:
    """The forward of `module` and the facts its tracing rests on. Raises Refused with the reason."""
    function = _plain_forward(module)
    tree = _parse(function)
    arguments = [a.arg for a in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
    if tree.args.vararg or tree.args.kwarg:
        raise Refused("forward takes *args or **kwargs")
    if not arguments:
        raise Refused("forward has no self")
    reader = _Reader(module, function, arguments[0], set(arguments[1:]))
    reader.block(tree.body)
    return function, reader.facts


def _plain_forward(module: nn.Module) -> types.FunctionType:
    if "forward" in module.__dict__:
        raise Refused("forward was replaced on the instance")
    function = inspect.getattr_static(type(module), "forward", None)
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise Refused("forward is not a plain function (decorated or generated)")
    if type(module).__call__ is not nn.Module.__call__ or type(module)._call_impl is not nn.Module._call_impl:
        raise Refused("the class overrides __call__")
    if (
        type(module).__getattr__ is not nn.Module.__getattr__
        or type(module).__getattribute__ is not object.__getattribute__
    ):
        raise Refused("the class overrides attribute access")
    return function


def _parse(function: types.FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, ValueError):
        raise Refused("the source of forward is not available") from None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Refused("forward is decorated or asynchronous")
    if not _is_source_of(function):
        raise Refused("the source of forward is not what runs: its file was changed after the import")
    return tree


def _is_source_of(function: types.FunctionType) -> bool:
    """Whether the file, as it is now, compiles to the code that runs: inspect reads it anew, Python does not."""
    original = function.__code__
    made = _compiled("".join(inspect.findsource(function)[0])).get((original.co_name, original.co_firstlineno))
    return (
        made is not None
        and made.co_code == original.co_code
        and made.co_names == original.co_names
        and made.co_varnames == original.co_varnames
        and _constants(made) == _constants(original)
    )


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> dict[tuple[str, int], types.CodeType]:
    """All functions in a file, by name and first line. The whole file: the compiler looks at its imports."""
    try:
        todo = [compile(text, "<source>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)]
    except (SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], types.CodeType] = {}
    while todo:
        code = todo.pop()
        found[code.co_name, code.co_firstlineno] = code
        todo.extend(c for c in code.co_consts if isinstance(c, types.CodeType))
    return found


def _constants(code: types.CodeType) -> list[str]:
    return [repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]


class _Reader:
    def __init__(self, module: nn.Module, function: types.FunctionType, self_name: str, names: set[str]) -> None:
        self.module = module
        self.function = function
        self.self_name = self_name
        self.local = names
        self.modules: set[str] = set()  # local names that a for loop binds to child modules
        self.containers: set[str] = set()  # local names that may hold a list or dict which this forward made
        self.facts = Facts()

    # -------------------------------------------------------------------------------------------- statements
    def block(self, body: list[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Return):
            if node.value is not None:
                self.expression(node.value)
        elif isinstance(node, ast.Expr):
            self.expression(node.value)
        elif isinstance(node, ast.Assign):
            self.expression(node.value)
            for target in node.targets:
                self.bind(target, self.makes_container(node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.expression(node.value)
            self.bind(node.target, self.makes_container(node.value))
        elif isinstance(node, ast.For):
            self.loop(node)
        elif not isinstance(node, ast.Pass):
            raise Refused(f"forward has {_words(node)} in line {node.lineno}")

    def bind(self, target: ast.expr, container: bool) -> None:
        if isinstance(target, ast.Name):
            self.local.add(target.id)
            self.modules.discard(target.id)
            if container:  # never taken back: in a loop the earlier line runs again
                self.containers.add(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for item in target.elts:
                self.bind(item, container)
        else:
            raise Refused(f"forward assigns to {ast.unparse(target)}")

    def loop(self, node: ast.For) -> None:
        if node.orelse or not isinstance(node.target, ast.Name):
            raise Refused(f"forward has a loop that is not 'for x in self.blocks' in line {node.lineno}")
        name = self.attribute_of_self(node.iter)
        if name is None and not (isinstance(node.iter, ast.Name) and node.iter.id == self.self_name):
            raise Refused(f"forward loops over {ast.unparse(node.iter)}")
        container = self.module if name is None else self.module._modules.get(name)
        if (
            type(container) is not nn.ModuleList
            and getattr(type(container), "__iter__", None) is not nn.Sequential.__iter__
        ):
            raise Refused(f"forward loops over {ast.unparse(node.iter)}, which is no ModuleList or Sequential")
        assert isinstance(container, nn.Module)
        self.facts.loops[name or ""] = tuple(container._modules)
        self.local.add(node.target.id)
        self.modules.add(node.target.id)
        self.block(node.body)

    # -------------------------------------------------------------------------------------------- expressions
    def expression(self, node: ast.AST) -> None:
        if isinstance(node, ast.Compare):
            # `a > b` of tensors is an operator; `is`, `in` and chains are decisions
            if len(node.ops) != 1 or isinstance(node.ops[0], (ast.Is, ast.IsNot, ast.In, ast.NotIn)):
                raise Refused(f"forward decides by {ast.unparse(node)}")
            self.expression(node.left)
            self.expression(node.comparators[0])
            return
        if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not):
            self.expression(node.operand)
            return
        if not isinstance(node, _EXPRESSIONS):
            raise Refused(f"forward has {_words(node)}: {ast.unparse(node)}")
        if isinstance(node, ast.Name):
            self.name(node)
        elif isinstance(node, ast.Attribute):
            self.attribute(node)
        elif isinstance(node, ast.Call):
            self.call(node)
        elif isinstance(node, ast.Dict) and any(k is None for k in node.keys):
            raise Refused("forward unpacks a dict")
        else:
            for child in ast.iter_child_nodes(node):
                self.expression(child)

    def name(self, node: ast.Name) -> None:
        if node.id == self.self_name:
            raise Refused("forward passes self on")
        if node.id in self.modules:
            raise Refused(f"forward uses the module {node.id} without calling it")
        if node.id not in self.local:
            self.torch_object((node.id,))

    def attribute(self, node: ast.Attribute) -> None:
        own = self.attribute_of_self(node)
        if own is not None:
            self.read_self(own)
            return
        dotted = _dotted(node)
        if dotted is not None and dotted[0] not in self.local and dotted[0] != self.self_name:
            self.torch_object(dotted)
            return
        if dotted is not None and (dotted[0] == self.self_name or dotted[0] in self.modules):
            if dotted[0] == self.self_name and dotted[1] in self.tensor_names():
                self.facts.tensors.add(dotted[1])  # self.weight.dtype
                return
            raise Refused(f"forward reads {'.'.join(dotted)} from inside a child")
        self.expression(node.value)  # x.shape

    def call(self, node: ast.Call) -> None:
        for argument in node.args:
            if isinstance(argument, ast.Starred):
                raise Refused("forward unpacks arguments with *")
            self.expression(argument)
        for keyword in node.keywords:
            if keyword.arg is None:
                raise Refused("forward unpacks arguments with **")
            self.expression(keyword.value)
        function = node.func
        if isinstance(function, ast.Name) and function.id in self.modules:
            self.hands_over(node)
            return
        own = self.attribute_of_self(function)
        if own is not None:
            self.hands_over(node)
            if own not in self.module._modules or self.module._modules[own] is None:
                raise Refused(f"forward calls self.{own}, which is no child module")
            return
        dotted = _dotted(function)
        if dotted is not None and dotted[0] not in self.local and dotted[0] != self.self_name:
            found = self.torch_object(dotted)
            if not callable(found) or isinstance(found, type):
                raise Refused(f"forward calls {'.'.join(dotted)}")
            if not any(self.symbolic(a) for a in (*node.args, *(k.value for k in node.keywords))):
                raise Refused(f"{'.'.join(dotted)} is called without a tensor: tracing would freeze its answer")
            self.facts.called.add(dotted)
        elif isinstance(function, ast.Attribute):
            self.expression(function)  # a tensor method
        else:
            raise Refused(f"forward calls {ast.unparse(function)}")

    def hands_over(self, node: ast.Call) -> None:
        """A child may write into a list or dict that this forward made; the graph would show it a copy."""
        for argument in (*node.args, *(k.value for k in node.keywords)):
            for part in ast.walk(argument):
                if isinstance(part, ast.Name) and part.id in self.containers:
                    raise Refused(f"forward keeps {part.id}, a list or dict that it passes to {ast.unparse(node.func)}")

    def makes_container(self, node: ast.expr) -> bool:
        """Whether a value may be, or hold, a list or dict that this forward made. Calls of children and of torch give
        what stays symbolic; a method of such a container (`copy`, `setdefault`) may give anything of it."""
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and self.makes_container(node.func.value)
        if isinstance(node, (ast.List, ast.Dict)):
            return True
        if isinstance(node, ast.Name):
            return node.id in self.containers
        return any(self.makes_container(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr))

    def symbolic(self, node: ast.AST) -> bool:
        """Whether an argument mentions anything that stays symbolic while tracing."""
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and part.id in self.local:
                return True
            if self.attribute_of_self(part) in self.facts.tensors:
                return True
        return False

    # -------------------------------------------------------------------------------------------- what names mean
    def attribute_of_self(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return node.attr
        return None

    def tensor_names(self) -> set[str]:
        return {n for n, t in (*self.module._parameters.items(), *self.module._buffers.items()) if t is not None}

    def read_self(self, name: str) -> None:
        module = self.module
        if name in self.tensor_names():
            self.facts.tensors.add(name)
            return
        if name in module._modules:
            raise Refused(f"forward uses self.{name} without calling it")
        static = inspect.getattr_static(type(module), name, None)
        if static is not None and not isinstance(static, _SCALARS):
            raise Refused(f"self.{name} is a property or method")
        if not hasattr(module, name):
            raise Refused(f"self.{name} does not exist")
        value = getattr(module, name)
        if type(value) not in _SCALARS:
            raise Refused(f"self.{name} is a {type(value).__name__}, which could change between calls")
        self.facts.scalars[name] = value

    def torch_object(self, dotted: tuple[str, ...]) -> Any:
        """A global that belongs to torch. It is compared at every call, for people do patch torch.nn.functional."""
        if dotted[0] in self.function.__code__.co_freevars:
            raise Refused(f"forward uses {dotted[0]} of an enclosing function")
        try:
            found = resolve(self.function, dotted)
        except (KeyError, AttributeError):
            raise Refused(f"forward uses {'.'.join(dotted)}, which is not known") from None
        if isinstance(found, types.ModuleType) or not _belongs_to_torch(found):
            raise Refused(f"forward uses {'.'.join(dotted)}, which is not torch's")
        self.facts.functions[dotted] = found
        return found


def resolve(function: types.FunctionType, dotted: tuple[str, ...]) -> Any:
    """What a dotted name means inside `function` just now."""
    found: Any = function.__globals__[dotted[0]]
    for attribute in dotted[1:]:
        found = getattr(found, attribute)
    return found


def _belongs_to_torch(found: Any) -> bool:
    if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        return True
    home = getattr(found, "__module__", None) or type(found).__module__
    if isinstance(found, type):
        return False
    return callable(found) and (home == "torch" or home.startswith("torch."))


def _dotted(node: ast.AST) -> tuple[str, ...] | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return (node.id, *reversed(parts)) if isinstance(node, ast.Name) else None


_WORDS = {
    "If": "a branch",
    "IfExp": "a branch",
    "While": "a while loop",
    "With": "a with block",
    "Try": "a try block",
    "AugAssign": "an assignment in place",
    "BoolOp": "a decision",
    "Not": "a decision",
    "Assert": "an assertion",
    "Raise": "a raise",
    "Lambda": "a lambda",
    "JoinedStr": "an f-string",
}


def _words(node: ast.AST) -> str:
    kind = type(node.op).__name__ if isinstance(node, ast.UnaryOp) else type(node).__name__
    return _WORDS.get(kind, f"a {kind}")
