"""Lets SGLang's own markers work on a torch without CUDA: each goes to a file, one per process.

Lies on PYTHONPATH, so that the workers that SGLang spawns have it too.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from typing import Any

NAME = "torch.cuda.nvtx"


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        loader: Any = spec.loader if spec is not None else None
        run = loader.exec_module

        def exec_module(module):
            run(module)
            file = open(f"{os.environ['OWN_MARKERS']}/{os.getpid()}.txt", "a", buffering=1)  # noqa: SIM115
            module.range_push = lambda text: file.write(f"{text}\n")
            module.range_pop = lambda: None

        loader.exec_module = exec_module
        return spec


if os.environ.get("OWN_MARKERS"):
    sys.meta_path.insert(0, Finder())
