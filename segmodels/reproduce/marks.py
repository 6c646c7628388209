"""The marks between which generated parts of a document stand, beside parts of other makers."""

from __future__ import annotations


def marked(name: str, text: str) -> str:
    """The part between its marks."""
    return f"<!-- {name}: begin, generated -->\n{text.strip()}\n<!-- {name}: end -->\n"


def replaced(document: str, name: str, text: str) -> str | None:
    """The document with this part made anew, None where it has no such part."""
    head, begin, rest = document.partition(f"<!-- {name}: begin, generated -->")
    return head + marked(name, text) + rest.partition(f"<!-- {name}: end -->")[2].removeprefix("\n") if begin else None
