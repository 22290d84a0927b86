"""Format values and untrusted text for a reader.

Programs and their output may contain control characters, bidirectional overrides or lone
surrogates, or be ten megabytes long. `visible` and `clip` make such text readable; the template
escapes it for HTML (autoescape).
"""

import math
import re

DASH = "—"

SEPARATORS_AND_BIDI = (0x200B, *range(0x2028, 0x202F))
BIDI_MARKS = (0x061C, 0x200E, 0x200F, *range(0x2066, 0x206A))
C1_CONTROLS = range(0x80, 0xA0)
SURROGATES = range(0xD800, 0xE000)  # a lone one has no UTF-8 encoding
SHOWN_BY_NAME = (*C1_CONTROLS, *SEPARATORS_AND_BIDI, *BIDI_MARKS, 0xFEFF)
# invisible characters, and those that reorder their neighbours, to visible ones
UNSEEN = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
    | {0x7F: "␡"}
    | {code: f"⟨U+{code:04X}⟩" for code in SHOWN_BY_NAME}
    | {code: "\ufffd" for code in (*SURROGATES, 0xFFFE, 0xFFFF)}
)
ANY_UNSEEN = re.compile(f"[{re.escape(''.join(map(chr, UNSEEN)))}]")


def visible(text: str) -> str:
    """Return `text` with each character of UNSEEN replaced by a visible one."""
    if not ANY_UNSEEN.search(text):  # true of nearly all texts, and much faster than translate
        return text
    return text.replace("\r\n", "\n").translate(UNSEEN)


def clip(text: str, characters: int) -> str:
    """Shorten a long text to its head and tail, with a note of how much is left out."""
    if len(text) <= characters:
        return text
    head, tail = characters * 2 // 3, characters - characters * 2 // 3
    left_out = len(text) - characters
    return f"{text[:head]}\n… {left_out:,} characters left out …\n{text[-tail:]}"


def percent(fraction: float | None, unit: str = "%") -> str:
    return DASH if fraction is None else f"{100 * fraction:.1f}{unit}".replace("-", "−")


def points(fraction: float) -> str:
    """Format a difference of two fractions, in percentage points."""
    return f"{100 * fraction:+.1f}".replace("-", "−")


def significant(value: float) -> str:
    """Format with three or more significant digits; below 1e-4 or from 1e6, two and an exponent."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("-", "−")
    decimals = 2 if not value else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")
