"""The package's exception for bad input."""

from __future__ import annotations

import unicodedata

LONGEST = 4000  # characters of a sentence
HIDDEN = ("Cc", "Cf", "Zl", "Zp", "Cs")  # Unicode's categories of characters that act, not show


class StepQuantError(ValueError):
    """Bad input, described in one sentence: the thing, what was found, what was expected, a remedy.

    The command line prints this sentence and exits with code 2. Values from files and arguments
    stand in it, so the sentence is cut in its middle where it is long, and characters that would
    act on a terminal, such as line ends, become spaces.
    """

    def __init__(self, *sentence: object) -> None:
        super().__init__(*(shown(part) if isinstance(part, str) else part for part in sentence))


def shown(text: str) -> str:
    """Return `text` as it may be printed: short, in one line, without control characters."""
    if len(text) > LONGEST:
        half = LONGEST // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} [{left_out} characters left out] {text[-half:]}"
    if text.isprintable():
        return text
    kept = (" " if unicodedata.category(each) in HIDDEN else each for each in text)
    return "".join(kept)
