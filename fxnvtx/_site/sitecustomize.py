"""What every Python process started below `fxnvtx run` executes first; it waits for torch and costs nothing until then.

`fxnvtx run` puts this folder on PYTHONPATH and its options into FXNVTX_RUN. Nothing is imported here that an
interpreter has not imported by itself. A sitecustomize of the user's own is handed on to, as if this one were not
there. Another Python 3 may meet this file, so it keeps to what all of them understand, and is without types.
"""

# mypy: ignore-errors

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_VARIABLE = "FXNVTX_RUN"
# What of this package imports torch: where a program begins with one of these, torch has to be there (and be armed)
# before their first line runs, or arming would find them half imported.
_WITH_TORCH = frozenset(
    [
        "compile",
        "integrations",
        "models",
        "modules",
        "pipeline",
    ]
)


class _AtTorch:
    """A finder that finds nothing; it sees torch being imported and arms the process right after."""

    def __init__(self, options):
        self.options = options

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            if name.startswith("fxnvtx.") and name.split(".")[1] in _WITH_TORCH and "torch" not in sys.modules:
                try:
                    import torch  # noqa: F401
                except ImportError:  # whoever is being imported will say so
                    pass
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    _after_exec(spec.loader, self.armed)
                    return spec
        return None

    def armed(self):
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        try:
            _package(self.options["package"])
            from fxnvtx.integrations.launched import arm

            arm(self.options)
        except Exception as error:  # the program goes on without ranges
            sys.stderr.write(f"fxnvtx: process {os.getpid()} shows no ranges: {type(error).__name__}: {error}\n")


def _after_exec(loader, then):
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module):
        del loader.exec_module
        execute(module)
        then()

    loader.exec_module = exec_module


def _package(folder):
    """The very fxnvtx that was launched, whether or not this process could find one on its own."""
    if "fxnvtx" in sys.modules:
        return
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fxnvtx", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
    module = sys.modules["fxnvtx"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["fxnvtx"]
        raise


def _begin():
    text = os.environ.get(_VARIABLE)
    if not text or sys.version_info < (3, 10):
        return
    # "name=value" lines, not JSON: a process that never imports torch must not have imported json either
    options = dict(line.partition("=")[::2] for line in text.split("\n"))
    if "first" in options:  # the first process of the program; those below it are not
        os.environ[_VARIABLE] = "\n".join(line for line in text.split("\n") if not line.startswith("first="))
    # torch's own pool for compiling kernels starts with this file: no model is ever called there
    if not any("compile_worker" in word for word in sys.orig_argv[1:3]):
        sys.meta_path.insert(0, _AtTorch(options))


try:
    _begin()
except Exception as _error:
    sys.stderr.write(f"fxnvtx: {_VARIABLE} is not understood: {_error}\n")
sys.path[:] = [_entry for _entry in sys.path if os.path.abspath(_entry) != _HERE]
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: E402, F401 - the user's own; without one, the ImportError that Python expects
