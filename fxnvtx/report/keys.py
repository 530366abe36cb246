"""Which row of a grouped view a range belongs to (pure)."""

from __future__ import annotations

from collections.abc import Callable

from ..categories import LOOP, MODULE, OP, STAGE
from .labels import Folding, Name, category_of, fused_owners
from .rows import Selection
from .tree import Node

__all__ = ["Keys"]

NO_CLASS = "class not recorded"


class Keys:
    """Made from the whole tree, used on it and on each process's own.

    A module is a range of category "module". Captures that have none (torch's own ranges) are shown by operator: there
    "op" takes its place.
    """

    def __init__(self, root: Node, classes: dict[str, str], chosen: Selection) -> None:
        self._classes = classes
        self._chosen = chosen
        self.fold = Folding(classes)
        some = any(node.parent is not None and category_of(node.name) == MODULE for node in root.walk())
        self._unit = MODULE if some else OP

    def function(self) -> Callable[[Node], str | None]:
        """range -> its row's name, or None where it belongs to the row around it."""
        by = self._chosen.by
        if by in {"request", "step"}:
            return lambda node: self._shown(node.name) if category_of(node.name) == by else None
        return {"range": self._range, "stage": self._stage, "component": self._component, "class": self._class}.get(
            by, self._module
        )

    def alias(self, node: Node) -> str | None:
        """What else a pattern can mean this range by: in the view by class, its class."""
        return self._class(node) if self._chosen.by == "class" else None

    def _shown(self, name: Name) -> str:
        return self.fold(name.text, name.category) if self._chosen.fold else name.text

    def _is_module(self, node: Node) -> bool:
        return category_of(node.name) == self._unit and not fused_owners(node.name.text)

    def _range(self, node: Node) -> str:
        shown = self._shown(node.name)
        return f"{node.name.domain}:{shown}" if node.name.domain else shown

    def _stage(self, node: Node) -> str | None:
        """Where the loop lies in no stage, it is one."""
        return self._shown(node.name) if category_of(node.name) in (STAGE, LOOP) else None

    def _component(self, node: Node) -> str | None:
        """The outermost modules: the view looks no further inside."""
        return node.name.text if node.is_unknown() else self._shown(node.name) if self._is_module(node) else None

    def _class(self, node: Node) -> str | None:
        if node.is_unknown():
            return node.name.text
        return self._classes.get(_bare(node.name.text), NO_CLASS) if self._is_module(node) else None

    def _module(self, node: Node) -> str | None:
        if node.is_unknown():
            return node.name.text
        if not self._is_module(node):
            return None
        text = self._shown(node.name)
        if self._chosen.depth is not None:
            text = ".".join(_bare(text).split(".")[: self._chosen.depth])
        return text


def _bare(text: str) -> str:
    """A label without the shapes of its inputs."""
    return text.partition(" in=")[0]
