"""Change an attribute of one module instance for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_ABSENT: Any = object()


@contextlib.contextmanager
def override(module: nn.Module, name: str, value: object) -> Iterator[None]:
    """Shadow attribute `name` of `module` by `value`, then put back exactly what was there.

    Works for plain attributes, methods and submodules; the class stays untouched.
    """
    slots = module._modules if name in module._modules else module.__dict__
    before = slots.pop(name, _ABSENT)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        if before is not _ABSENT:
            slots[name] = before
