"""HookRegistry: hooks by dotted path, applied at one point."""

import enum
import functools
import pkgutil
from typing import Any

HookType = enum.Enum("HookType", ["BEFORE", "AFTER", "AROUND", "REPLACE"])


class HookRegistry:
    hooks: list[Any] = []

    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER):
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls):
        for target, hook, hook_type in cls.hooks:
            owner, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(owner)
            setattr(owner, name, wrapped(getattr(owner, name), hook, hook_type))


def wrapped(original, hook, hook_type):
    if isinstance(hook, type):
        return hook

    @functools.wraps(original)
    def call(*args, **kwargs):
        if hook_type is HookType.REPLACE:
            return hook(*args, **kwargs)
        if hook_type is HookType.AROUND:
            return hook(original, *args, **kwargs)
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return call
