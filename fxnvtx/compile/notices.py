"""What a user has to know about a compiled model, once per process and reason."""

from __future__ import annotations

import logging
import threading

__all__ = ["warn_once"]

log = logging.getLogger("fxnvtx")
_told: set[str] = set()
_lock = threading.Lock()


def warn_once(reason: str, text: str) -> None:
    with _lock:
        if reason in _told:
            return
        _told.add(reason)
    log.warning("%s", text)
