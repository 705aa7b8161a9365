"""Figures as people read them: few digits, always with their unit."""

from __future__ import annotations

import math
from collections.abc import Sequence

from understudy.facts import format_bytes

NATS = "nats a token"


def number(value: float | None, digits: int = 3) -> str:
    """Write a figure with so many significant digits at least, thousands apart; a dash where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(places, 0)}f}"


def spread(mean: float | None, sd: float | None, digits: int = 3) -> str:
    """Write a mean, and its standard deviation where there is one, to the same place."""
    if mean is None or sd is None or not math.isfinite(mean) or not math.isfinite(sd):
        return number(mean, digits)
    if mean == 0 or abs(mean) >= 1e7 or abs(mean) < 1e-4:
        return f"{number(mean, digits)} ± {number(sd, 2)}"
    places = max(digits - 1 - math.floor(math.log10(abs(mean))), 0)
    return f"{mean:,.{places}f} ± {sd:,.{places}f}"


def percent(share: float | None, places: int = 1) -> str:
    """Write a share in percent."""
    return "–" if share is None else f"{share:.{places}%}"


def change(before: float, after: float) -> str:
    """Write by how much a figure changed, in percent of what it was."""
    if not before:
        return "–"
    share = after / before - 1
    return f"{share:+.1%}".replace("-", "−") if abs(share) < 10 else f"×{number(after / before)}"


def size(nbytes: int | None) -> str:
    """Write bytes in decimal units."""
    return "–" if nbytes is None else format_bytes(nbytes)


def parameters(count: int | None) -> str:
    """Write a number of parameters."""
    if count is None:
        return "–"
    for power, letter in ((9, "B"), (6, "M"), (3, "K")):
        if count >= 10**power:
            return f"{number(count / 10**power)}{letter}"
    return str(count)


def listed(names: Sequence[str], most: int = 6) -> str:
    """Write names as a sentence has them: `a, b and c`, and how many more past a few."""
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else "none"


def few(n: int, one: str, many: str | None = None) -> str:
    """Write a number with the word that goes with it."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
