"""The page itself: HTML with its pictures inside, which needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; padding-top: .8rem; border-top: 1px solid #ddd; }
p { margin: .4rem 0; max-width: 50rem; }
nav a { margin-right: 1rem; color: #0058a0; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem; }
th { text-align: left; font-weight: 600; color: #555; }
th, td { padding: .15rem 1rem .15rem 0; border-bottom: 1px solid #eee; vertical-align: top;
         overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pale { color: #666; }
.warning { background: #fff4d6; padding: .3rem .6rem; }
"""


@dataclass(frozen=True)
class Section:
    """A title, and what is below it: pieces of HTML."""

    key: str
    title: str
    parts: Sequence[str]


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole page."""
    links = "".join(f'<a href="#{one.key}">{escape(one.title)}</a>' for one in sections)
    body = "\n".join(_section(one) for one in sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="pale">{escape(subtitle)}</p>\n<nav>{links}</nav>\n'
        f"{body}\n</body>\n</html>\n"
    )


def _section(one: Section) -> str:
    return f'<h2 id="{one.key}">{escape(one.title)}</h2>\n' + "\n".join(one.parts)


def text(words: str, style: str = "") -> str:
    """A paragraph."""
    return f'<p class="{style}">{escape(words)}</p>' if style else f"<p>{escape(words)}</p>"


def picture(png: bytes, words: str) -> str:
    """A picture, and the words for those who don't see it."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{escape(words)}" src="data:image/png;base64,{data}">'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand at the right of their column."""
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    lines = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{lines}\n</table>"


def pairs(values: Mapping[str, object]) -> str:
    """A table of names and values."""
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<table>\n{rows}\n</table>"


def _cells(row: Sequence[object]) -> Iterator[str]:
    for value in row:
        if isinstance(value, int):
            yield f'<td class="number">{value:,}</td>'
        elif isinstance(value, float):
            yield f'<td class="number">{value:.3f}</td>'
        else:
            yield f"<td>{escape(str(value))}</td>"
