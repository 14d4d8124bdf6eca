"""Plug-ins by file: a module in a package that defines one constant is all there is to a plug-in."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection
from typing import Any


def module_names(package: str, helpers: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the plug-in modules of `package`, sorted: neither folders, nor `_private` modules, nor `helpers`."""
    folder = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(folder) if not module.ispkg)
    return tuple(sorted(name for name in found if not name.startswith("_") and name not in helpers))


def load(package: str, module: str, constant: str) -> Any:
    """The constant of one plug-in module; a module without it is a fault of the program, named as such."""
    loaded = importlib.import_module(f"{package}.{module}")
    try:
        return vars(loaded)[constant]
    except KeyError:
        raise LookupError(
            f"{package}.{module} defines no {constant}; define it, or call the module _{module} if it is a helper"
        ) from None


def discover(package: str, constant: str, helpers: Collection[str] = ()) -> dict[str, Any]:
    """Every plug-in of `package` by its `name`, in the order of the names; two of one name are refused."""
    found: dict[str, Any] = {}
    home: dict[str, str] = {}
    for module in module_names(package, helpers):
        plugin = load(package, module, constant)
        if plugin.name in found:
            raise LookupError(
                f"{constant} {plugin.name!r} is defined twice: in {package}.{home[plugin.name]} and in "
                f"{package}.{module}; rename one"
            )
        found[plugin.name], home[plugin.name] = plugin, module
    return dict(sorted(found.items()))
