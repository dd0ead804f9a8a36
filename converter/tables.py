"""Tables in which nothing is cut: a name that ends in … tells two tensors no longer apart."""

from __future__ import annotations

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text


def names(header: str) -> Column:
    """A column of names, which go on in the next line where they do not fit."""
    return Column(header, overflow="fold")


def titled(title: str, table: Table) -> Group:
    """A table under a line of markup, which may be wider than the table."""
    return Group(Text.from_markup(title, style="italic"), table)
