"""Rules that a user wrote: `REGEX=FORMAT`, and patterns of what stays unquantized."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffquant.core.errors import UsageError
from diffquant.quant.formats import format_named
from diffquant.quant.policy import Rule

__all__ = ["user_rules"]


def user_rules(
    tensor_types: Sequence[str],
    exclude: Sequence[str],
    *,
    type_option: str = "--tensor-type",
    exclude_option: str = "--exclude",
) -> tuple[Rule, ...]:
    """Read both lists; what is excluded comes first.

    Args:
        tensor_types: REGEX=FORMAT each.
        exclude: a regular expression each.
        type_option: where the first were given, for messages and reasons.
        exclude_option: where the second were.

    Raises:
        UsageError: no regular expression, no format, or one that is only read.
        UnknownFormat: no such format.
    """
    rules = [Rule(_pattern(text), None, f"{exclude_option} {text}") for text in exclude]
    for text in tensor_types:
        pattern, separator, name = text.rpartition("=")
        if not separator:
            raise UsageError(f"{type_option} {text}: expected REGEX=FORMAT")
        fmt = format_named(name.lower())
        if not fmt.encodes:
            raise UsageError(f"{type_option} {text}: {fmt.name} is read, not written")
        rules.append(Rule(_pattern(pattern), fmt.name, f"{type_option} {text}"))
    return tuple(rules)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise UsageError(f"{text}: not a regular expression: {error}") from None
    return text
