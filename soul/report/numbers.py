"""How numbers are written for people."""

from __future__ import annotations

import math
from typing import Final

DASH: Final = "–"
SUPERSCRIPTS: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SPACE: Final = "\N{NO-BREAK SPACE}"


def percent(share: float) -> str:
    """ "12 %"; one decimal near the ends, where a rounded 0 or 100 would claim too much."""
    value = 100 * min(max(share, 0.0), 1.0)
    if 0 < value < 0.05:
        return f"under{SPACE}0.1{SPACE}%"
    if 99.95 <= value < 100:
        return f"over{SPACE}99.9{SPACE}%"
    decimals = 1 if 0 < value < 0.95 or 99.05 < value < 100 else 0
    return f"{value:.{decimals}f}{SPACE}%"


def fixed(value: float, decimals: int = 3) -> str:
    return f"{value:.{decimals}f}".replace("-", "−")


def log10_p(p_value: float) -> str:
    """The exponent of a p-value: "−9.3"; "< −300" where the p-value itself underflows."""
    if p_value <= 1e-300:
        return "< −300"
    return fixed(min(math.log10(p_value), 0.0) + 0.0, 1)


def p_phrase(p_value: float) -> str:
    """ "p = 0.31" or, when it is tiny, "p = 5×10⁻¹⁰"."""
    if p_value <= 1e-300:
        return f"p{SPACE}<{SPACE}10⁻³⁰⁰"
    if p_value >= 0.01:
        return f"p{SPACE}={SPACE}{fixed(p_value, 2)}"
    digit, exponent = f"{p_value:.0e}".split("e")
    return f"p{SPACE}={SPACE}{digit}×10{str(int(exponent)).translate(SUPERSCRIPTS)}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 60), ("min", 60)):
        if seconds < 0.95 * size:
            return f"{seconds:.1f}{SPACE}{unit}"
        seconds /= size
    return f"{seconds:.1f}{SPACE}h"


def memory(num_bytes: float) -> str:
    """Binary units, as the allocators count."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.{0 if unit == 'B' else 1}f}{SPACE}{unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f}{SPACE}GiB"


def compact(value: float) -> str:
    """Four significant digits for axes and details: 1e−05, 0.3, 1,250."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value + 0.0:.4g}"
    return text.replace("-", "−")
