"""README.md of a converted folder: what it is, where it came from, its licence. The Hub reads the header."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

PIPELINE_TAG = "image-to-image"
STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
STABLE_DIFFUSION_LICENSE = "openrail++"  # of Stable Diffusion 2.1; it also holds for models derived from it
_YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")  # they are not read as text


@dataclass(frozen=True)
class Card:
    """The content of a card.

    Attributes:
        title: the folder's name. A user typed it, so it may hold anything.
        origin: one paragraph of Markdown that says what was converted.
        license: as the Hub names licences; "other" when unknown.
        base_model: Hub id or None.
        takes_prompts: whether the folder holds a text encoder.
        timestep, scale: as in the pipeline.
    """

    title: str
    origin: str
    license: str
    base_model: str | None
    takes_prompts: bool
    timestep: int
    scale: int

    def text(self) -> str:
        """The file's content."""
        base = f"base_model: {yaml_text(self.base_model)}\n" if self.base_model else ""
        prompts = (
            'The folder holds the text encoder: `pipeline(image, prompt="...")` takes a prompt instead.'
            if self.takes_prompts
            else "The folder holds no text encoder, so it takes no other prompt."
        )
        return f"""---
license: {yaml_text(self.license)}
library_name: diffusers
{base}pipeline_tag: {PIPELINE_TAG}
tags: [super-resolution, one-step-diffusion, qartsr]
---
# {markdown_text(self.title)}

One-step diffusion super-resolution, x{self.scale}, in full precision (float32). {self.origin}

```python
from qartsr_pipeline import QArtSRPipeline

pipeline = QArtSRPipeline.from_pretrained({json.dumps(self.title, ensure_ascii=False)})
pipeline(image).images[0]
```

One call of the UNet at T = {self.timestep} with the stored embedding of a fixed prompt. {prompts}

Quality and licence are those of the weights it was converted from; nothing was measured or trained in the conversion.
"""


def markdown_text(text: str) -> str:
    """`text` on one line, with every character escaped that Markdown or HTML would not show as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~])", r"\\\1", " ".join(text.split()))


def yaml_text(text: str) -> str:
    """`text` as a value in a YAML header: as it is where that is safe, otherwise quoted as JSON, which YAML reads, too."""
    is_plain = re.fullmatch(r"[A-Za-z][\w./+-]*", text) and text.lower() not in _YAML_WORDS
    return text if is_plain else json.dumps(text)


def license_of(card: Path) -> str | None:
    """The licence that a model card's header names; None without such a header or card."""
    if not card.is_file():
        return None
    header = card.read_text(encoding="utf-8", errors="replace").split("---")
    lines = header[1].splitlines() if len(header) > 2 and not header[0].strip() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return values[0].strip("'\"") or None if values else None
