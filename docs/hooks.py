"""What MkDocs calls while it builds the site."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Cross-references of Sphinx, which docstrings use, as plain code."""
    return re.sub(r":(?:func|class|meth|mod|data|attr):(?=<code>)", "", html)
