"""Results that are kept by what they were computed from, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class BoundedCache:
    """The latest results, computed one at a time; safe for several threads. What is there is given at once.

    Keys are hashes of content, so that a result never depends on who asked.

    Args:
        max_bytes: the oldest results go when all together have more. The newest always stays.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._changing, self._computing = threading.Lock(), threading.RLock()

    def get(self, key: Hashable, compute: Callable[[], Any], size: Callable[[Any], int] = lambda result: 1) -> Any:
        """The result of this key, computed if it is not there.

        Args:
            compute: may ask for other results.
            size: bytes of a result.
        """
        if (found := self._known(key)) is not None:
            return found[0]
        with self._computing:
            if (found := self._known(key)) is not None:  # another thread was faster
                return found[0]
            result = compute()
            with self._changing:
                self._found[key] = result, size(result)
                while len(self._found) > 1 and sum(each for _, each in self._found.values()) > self.max_bytes:
                    self._found.popitem(last=False)
            return result

    def _known(self, key: Hashable) -> tuple[Any, int] | None:
        with self._changing:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)
