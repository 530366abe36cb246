"""Pipelines to ask, and what to read off their ranges."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxnvtx import record
from fxnvtx.models.tiny_diffusers import TINY
from fxnvtx.recording import Node, Recording

STEPS = 2


def build(name: str) -> tuple[Any, Callable[..., Any]]:
    """A tiny pipeline and a function that runs one request of it."""
    pipe, arguments = TINY[name]("a red fox", 3)

    def ask(**more: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        given = {**arguments, "num_inference_steps": STEPS, "output_type": "pt", "generator": generator, **more}
        return tensors(pipe(**given))

    return pipe, ask


def tensors(made: Any) -> list[torch.Tensor]:
    """All tensors in what a pipeline returned."""
    if isinstance(made, torch.Tensor):
        return [made]
    if hasattr(made, "to_tuple"):
        made = made.to_tuple()
    if isinstance(made, (list, tuple)):
        return [t for part in made for t in tensors(part)]
    return [] if made is None else [torch.as_tensor(made)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """To the bit."""
    return len(a) == len(b) > 0 and all(torch.equal(x, y) and not x.isnan().any() for x, y in zip(a, b, strict=True))


def recorded(call: Callable[[], Any]) -> Recording:
    with record() as recording:
        call()
    return recording


def labels(nodes: list[Node]) -> list[str]:
    return [node.label for node in nodes]


def every(recording: Recording) -> Iterator[Node]:
    for root in recording.tree():
        yield from root.walk()


def only(recording: Recording, label: str) -> Node:
    """The one range of that name."""
    found = [node for node in every(recording) if node.label == label]
    assert len(found) == 1, (label, [n.label for n in every(recording) if n.category != "module"])
    return found[0]


def parents(root: Node) -> dict[int, Node]:
    """id of a node -> the node around it"""
    return {id(child): node for node in root.walk() for child in node.children}


def traces(pipe: Any, values: bool = True) -> list[Any]:
    """All that a pipeline, its components and their classes could keep of us, comparable. values=False: of the objects'
    own dicts only the names, since a request leaves new values there."""
    found: list[Any] = []
    things = [pipe, *(p for p in vars(pipe).values() if hasattr(p, "__dict__"))]
    for thing in things:
        parts = thing.modules() if isinstance(thing, torch.nn.Module) else [thing]
        for part in parts:
            found.append((type(part), [(k, id(v) if values else None) for k, v in vars(part).items()]))
            for base in type(part).__mro__:
                if not base.__module__.startswith(("torch.", "builtins", "collections")):
                    methods = [(k, id(v)) for k, v in vars(base).items() if isinstance(v, types.FunctionType)]
                    found.append((base, methods))
        if isinstance(thing, torch.nn.Module):
            found.append(list(thing.state_dict()))
    return found
