"""matplotlib's figures as files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_of(figure: Figure) -> bytes:
    """The bytes of a PNG, on white; without pyplot no display is needed, and no state is kept."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, facecolor="white")
    return content.getvalue()
