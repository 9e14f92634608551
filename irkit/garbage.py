"""Doing without Python's garbage collection for a moment."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users = 0
_was_enabled = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave garbage where it is until the last thread within has left.

    For work that makes many objects, none of them garbage: they would have Python look several times through all
    that the process holds, and jax alone is half a million objects. What was made meanwhile counts as old: or the
    collection that was put off would follow at once.
    """
    global _users, _was_enabled
    with _lock:
        if not _users:
            _was_enabled = gc.isenabled()
            gc.disable()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users and _was_enabled:
                if not gc.get_freeze_count():  # what somebody else has frozen shall stay so
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
