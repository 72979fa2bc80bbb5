"""A thread that runs calls one after the other, in the order of arrival.

transformers has such a thread too, but a call whose client is gone can end it with an InvalidStateError.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any


class Worker:
    """The thread. It is a daemon: a call that never returns does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, call: Callable[..., Any], *args: Any, **named: Any) -> Future[Any]:
        """Queue a call."""
        future: Future[Any] = Future()
        self._calls.put((future, partial(call, *args, **named)))
        return future

    def async_submit(self, call: Callable[..., Any], *args: Any, **named: Any) -> asyncio.Future[Any]:
        """Queue a call; for the event loop. A call that is cancelled before its turn does not run."""
        return asyncio.wrap_future(self.submit(call, *args, **named))

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    result = call()
                except BaseException as error:  # belongs to whoever waits for the call
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del future, call  # they hold tensors, which must not live until the next call
