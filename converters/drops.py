"""Which tensors without a place may be left out: none, unless a pattern of the user allows it. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from converters.names import fold
from workbench.errors import ConfigError


def allowed_drops(names: Collection[str], patterns: Sequence[str]) -> dict[str, str]:
    """Those of `names`, none of which has a place, that a pattern matches whole; with the pattern, as the reason."""
    found: dict[str, str] = {}
    for pattern in patterns:
        compiled = _compile(pattern)
        found |= {name: f"allowed by {pattern!r}" for name in names if name not in found and compiled.fullmatch(name)}
    return found


def require_used(patterns: Sequence[str], dropped: Collection[str]) -> None:
    """ConfigError for a pattern that allowed no drop: it is a slip, or what it was for has a place now."""
    for pattern in patterns:
        if not any(_compile(pattern).fullmatch(name) for name in dropped):
            raise ConfigError(
                f"--allow-drop {pattern!r} matches no tensor without a place; it must match a whole name, so write "
                f"'.*{pattern}.*' for a part of one, or leave the option out"
            )


def reasons(dropped: Mapping[str, str]) -> dict[str, list[str]]:
    """Why tensors are left out, each reason with their names, layers and experts folded."""
    found: dict[str, dict[str, None]] = {}
    for name, why in dropped.items():
        found.setdefault(why, {})[fold(name)] = None
    return {why: list(names) for why, names in found.items()}


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--allow-drop {pattern!r} is not a regular expression: {error}") from None
