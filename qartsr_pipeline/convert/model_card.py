"""README.md of a converted folder: what it is, where it came from, its licence. The Hub reads the header."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

PIPELINE_TAG = "image-to-image"
STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
STABLE_DIFFUSION_LICENSE = "openrail++"  # of Stable Diffusion 2.1; it also holds for models derived from it
_LONGEST_HEADER = 100_000  # characters
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
        video: whether it is a `LSGQuantVideoPipeline`.
    """

    title: str
    origin: str
    license: str
    base_model: str | None
    takes_prompts: bool
    timestep: int
    scale: int
    video: bool = False

    def text(self) -> str:
        """The file's content."""
        base = f"base_model: {yaml_text(self.base_model)}\n" if self.base_model else ""
        name, network = ("LSGQuantVideoPipeline", "transformer") if self.video else ("QArtSRPipeline", "UNet")
        prompts = (
            'The folder holds the text encoder: `pipeline(image, prompt="...")` takes a prompt instead.'
            if self.takes_prompts
            else "The folder holds no text encoder, so it takes no other prompt."
        )
        return f"""---
license: {yaml_text(self.license)}
library_name: diffusers
{base}pipeline_tag: {"video-to-video" if self.video else PIPELINE_TAG}
tags: [super-resolution, one-step-diffusion, qartsr]
---
# {markdown_text(self.title)}

One-step diffusion {"video " * self.video}super-resolution, x{self.scale}, in full precision (float32). {self.origin}

```python
from qartsr_pipeline import {name}

pipeline = {name}.from_pretrained({python_text(self.title)})
{"pipeline(clip).frames[0]" if self.video else "pipeline(image).images[0]"}
```

One call of the {network} at T = {self.timestep} with the stored embedding of a fixed prompt. {prompts}

Quality and licence are those of the weights it was converted from; nothing was measured or trained in the conversion.
"""


def printable(text: str) -> str:
    """`text` on one line. Characters that cannot be shown or stored, or that change how others are shown, become "?"."""
    hidden = ("Cc", "Cf", "Cs", "Cn", "Co")  # controls, marks of direction, bytes that were no text, unassigned, private
    return "".join("?" if unicodedata.category(letter) in hidden else letter for letter in " ".join(text.split()))


def markdown_text(text: str) -> str:
    """`text` on one line, with every character escaped that Markdown or HTML would not show as it is.

    Addresses and names with "@" do not become links either.
    """
    escaped = re.sub(r"([\\`*_{}\[\]()<>#+!|&~$@])", r"\\\1", printable(text))
    return re.sub(r"(?i)(://|\bwww\.)", lambda match: match[0].replace(":", r"\:").replace(".", r"\."), escaped)


def code_text(text: str) -> str:
    """A code span of one line."""
    return "`" + printable(text).replace("`", "'") + "`"


def python_text(text: str) -> str:
    """`text` as a string in Python code, with escapes for characters that cannot be shown or stored."""
    return "".join(
        letter if printable(letter) == letter or letter == " " else letter.encode("unicode_escape").decode("ascii")
        for letter in json.dumps(text, ensure_ascii=False)
    )


def yaml_text(text: str) -> str:
    """`text` as a value in a YAML header: as it is where that is safe, otherwise quoted as JSON, which YAML reads, too."""
    is_plain = re.fullmatch(r"[A-Za-z][\w./+-]*", text) and text.lower() not in _YAML_WORDS
    return text if is_plain else json.dumps(printable(text), ensure_ascii=False)


def license_of(card: Path) -> str | None:
    """The licence that a model card's header names; None without such a header or card."""
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        header = file.read(_LONGEST_HEADER).split("---")
    lines = header[1].splitlines() if len(header) > 2 and not header[0].strip() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return values[0].strip("'\"") or None if values else None
