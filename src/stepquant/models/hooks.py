"""Forward hooks for the calls of one thread, removed when their work is done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

Before = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call `before(name, args, kwargs)` and `after(name, args, kwargs, output)` around each call.

    `modules`: by the names that the hooks get. As with torch's own hooks, `before` may return other
    `(args, kwargs)` and `after` another output; None leaves them. Calls of other threads, which may
    use the modules meanwhile, are left alone. All hooks are removed at the end, whatever ends it.
    """
    thread = threading.get_ident()
    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                hook = partial(_without_module, thread, before, name)
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            if after is not None:
                hook = partial(_without_module, thread, after, name)
                handle = module.register_forward_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _without_module(
    thread: int, hook: Callable[..., Any], name: str, _: nn.Module, *call: Any
) -> Any:
    return hook(name, *call) if threading.get_ident() == thread else None
