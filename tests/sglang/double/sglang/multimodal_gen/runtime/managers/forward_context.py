"""What a forward runs for."""

from types import SimpleNamespace

CONTEXT = SimpleNamespace(forward_batch=None)


def get_forward_context():
    return CONTEXT
