"""Optional dependencies, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


def require(module: str, *, extra: str) -> Any:
    """Import ``module``; if it is not installed, say which extra of emovec brings it."""
    try:
        found: ModuleType = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ModuleNotFoundError(f"{module} is not installed; it comes with `pip install emovec[{extra}]`", name=error.name) from error
    return found
