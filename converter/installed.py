"""Which packages are installed: asked of their metadata, for importing them takes long."""

from __future__ import annotations

import importlib.metadata


def version(package: str) -> str:
    """An installed package's version; "" where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
