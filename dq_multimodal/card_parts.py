"""Cards that others write in too: our section lies between two markers, the rest is theirs."""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dq_multimodal.data.source import LICENCE

BEGIN = "<!-- dq-multimodal: begin -->"
END = "<!-- dq-multimodal: end -->"
SECTION = re.compile(f"{BEGIN}((?:(?!{BEGIN}).)*?){END}", re.DOTALL)
WROTE = "<!-- front matter: {} -->"
"""The second line of our section: the front matter that it came with."""
READ_WROTE = re.compile("^{}(.*){}$".format(*WROTE.split("{}")), re.MULTILINE)
HEAD = re.compile(r"\ufeff?---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)

Matter = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """A card in parts.

    Attributes:
        head: Text of the front matter, without its rules.
        before: Text before our section.
        after: Text after it; all of the text where there is none.
        wrote: The front matter that we wrote there, so that what was typed in since is known.
        has_section: Whether there is a section of ours.
    """

    head: str = ""
    before: str = ""
    after: str = ""
    wrote: Matter | None = None
    has_section: bool = False

    def merge(self, matter: Matter) -> Matter:
        """Give our front matter with what was typed into this one; see `with_section`."""
        return _merge(yaml.safe_load(self.head) or {}, matter, self.wrote or {})

    def with_text_of(self, other: "Card") -> "Card":
        """Add the paragraphs of another card that this one lacks."""
        before, after = _lacking(self, other.before), _lacking(self, other.after)
        return replace(self, before=_join(self.before, before), after=_join(self.after, after))

    def with_section(self, matter: Matter, body: str, typed: Matter | None = None) -> str:
        """Give the text of the card with a section of ours, in the place of the one before.

        Of the front matter stay the entries that are not ours and those that were typed in since
        we wrote it; our tags and configs go beside others. The licence is ours if we name one.

        Args:
            matter: Our front matter.
            body: Our section.
            typed: Our front matter with what was typed into it elsewhere.
        """
        wrote = json.dumps(matter, default=str).replace("<", "\\u003c").replace(">", "\\u003e")
        section = f"{BEGIN}\n{WROTE.format(wrote)}\n\n{body}\n\n{END}"
        head = _merge_heads(self.head, typed or matter, self.wrote or {})
        return f"---\n{head}---\n\n" + _join(self.before, section, self.after)

    def without_section(self) -> str:
        """Give the text of the card without what we wrote; "" where nothing is left."""
        head = _merge_heads(self.head, {}, self.wrote or {})
        return (f"---\n{head}---\n\n" if head.strip() else "") + _join(self.before, self.after)


def read_card(text: str) -> Card:
    """Part a card; a front matter that is no mapping counts as text."""
    text = text.replace("\r\n", "\n")
    head, found = "", HEAD.match(text)
    if found and _is_mapping(found.group(1)):
        head, text = found.group(1), text[found.end() :]
    section = SECTION.search(text)
    if section is None:
        return Card(head, after=text)
    before, after = text[: section.start()], text[section.end() :]
    return Card(head, before, after, _read_wrote(section.group(1)), has_section=True)


def plain_card(matter: Matter, body: str) -> str:
    """Give the card as releases without markers wrote it, in which nobody else has written."""
    return f"---\n{_dump(matter)}---\n\n{body}\n"


def _is_mapping(head: str) -> bool:
    try:
        return isinstance(yaml.safe_load(head) or {}, dict)
    except yaml.YAMLError:
        return False


def _read_wrote(section: str) -> Matter:
    line = READ_WROTE.search(section)
    try:
        found = json.loads(line.group(1)) if line else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _join(*parts: str) -> str:
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


def _lacking(card: Card, text: str) -> str:
    paragraphs = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    return "\n\n".join(p for p in paragraphs if p not in card.before and p not in card.after)


def _merge_heads(head: str, ours: Matter, wrote: Matter) -> str:
    """Merge our front matter into the text of another, whose other lines stay as they are."""
    theirs: Matter = yaml.safe_load(head) or {}
    merged = _merge(theirs, ours, wrote)
    if merged == theirs:
        return head
    is_kept = {key: key in merged and merged[key] == theirs[key] for key in theirs}
    kept = "".join(text for key, text in _entries(head, theirs) if is_kept.get(key, True))
    changed = [key for key in {**ours, **merged} if key in merged and not is_kept.get(key)]
    text = kept + _dump({key: merged[key] for key in changed})
    return text if _is_mapping(text) and yaml.safe_load(text) == merged else _dump(merged)


def _entries(head: str, matter: Matter) -> list[tuple[Any, str]]:
    """Give the text of each entry with its key; what stands before the first has none."""
    if not matter:
        return [(None, head)]
    node: Any = yaml.compose(head, yaml.SafeLoader)
    starts = [key.start_mark.index for key, _ in node.value]
    if len(starts) != len(matter):
        return []
    ends = [*starts[1:], len(head)]
    texts = [head[start:end] for start, end in zip(starts, ends, strict=True)]
    return [(None, head[: starts[0]]), *zip(matter, texts, strict=True)]


def _merge(theirs: Matter, ours: Matter, wrote: Matter) -> Matter:
    merged = {key: value for key, value in theirs.items() if key not in LICENCE}
    for key in {key: 0 for key in (*wrote, *ours) if key not in LICENCE}:
        value: Any
        now, mine, old = theirs.get(key), ours.get(key), wrote.get(key)
        if isinstance(mine or old, list):
            value = _unite(_as_list(mine), _as_list(now), _as_list(old))
        else:
            value = now if key in theirs and now != old else mine
        if value in (None, []):
            merged.pop(key, None)
        else:
            merged[key] = value
    stated = {key: ours[key] for key in LICENCE if key in ours}
    typed = {key: theirs[key] for key in LICENCE if theirs.get(key) != wrote.get(key)}
    typed = {key: value for key, value in typed.items() if key in theirs}
    is_the_same = stated.get("license") == theirs.get("license")
    return merged | (typed | stated if is_the_same or not stated else stated)


def _unite(mine: list[Any], now: list[Any], old: list[Any]) -> list[Any]:
    """Put our entries beside those of others; configs are told apart by their names."""
    names = [_name(entry) for entry in mine]
    others = [entry for entry in now if entry not in old and _name(entry) not in names]
    # in their order, so that a card that says all already does not change
    found = [entry for entry in now if entry in mine or entry in others]
    return found + [entry for entry in mine if entry not in found]


def _name(entry: Any) -> Any:
    return entry.get("config_name") if isinstance(entry, dict) else entry


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dump(matter: Matter) -> str:
    return yaml.safe_dump(matter, sort_keys=False) if matter else ""
