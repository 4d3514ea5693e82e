"""Markdown from names that anybody may have chosen: columns, labels, files, datasets."""

import re
import unicodedata

STEERING = {"Cc", "Cs", "Zl", "Zp"}
"""Categories of characters that are no text: controls, halves of pairs, line separators."""
TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of all that follows."""


def clean(text: str) -> str:
    """Put a text on one line, without characters that only steer what shows it."""
    found = (
        " " if c.isspace() else "\ufffd" if unicodedata.category(c) in STEERING else c
        for c in text
        if c not in TURNING
    )
    return " ".join("".join(found).split())


def escape(text: str) -> str:
    """Give a text that Markdown shows as it is, on one line, wherever it stands."""
    text = re.sub(r"([\\`*\[\]|~$#])", r"\\\1", clean(text))
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # within a word it is no mark
    text = text.replace("://", ":&#47;/").replace("www.", "www&#46;")  # or it becomes a link
    text = re.sub(r"&(?!#(47|46);)(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    text = re.sub(r"^([-+=>])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", text)


def code(text: str) -> str:
    """Give a text as a code span, which shows it letter for letter; "" has none."""
    text = clean(text)
    if not text:
        return ""
    if "<!--" in text or "|" in text:  # the marks of our section; the walls of a table
        return escape(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if "`" in (text[0], text[-1]) else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def table(head: list[str], lines: list[list[str]]) -> str:
    """Give a table of cells that are Markdown already."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])
