"""README.md of a converted folder: what it is, where it came from, under which licence; its header is read by the Hub."""

from __future__ import annotations

from dataclasses import dataclass

PIPELINE_TAG = "image-to-image"
STABLE_DIFFUSION = "stabilityai/stable-diffusion-2-1-base"
STABLE_DIFFUSION_LICENSE = "openrail++"  # Stable Diffusion 2.1's, which reaches models derived from it


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: the folder's name.
        origin: one paragraph of Markdown: what was made from what.
        license: as the Hub names licences; "other" when unknown.
        base_model: Hub id or None.
        takes_prompts: the folder holds a text encoder.
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
        base = f"base_model: {self.base_model}\n" if self.base_model else ""
        prompts = (
            'The folder holds the text encoder: `pipeline(image, prompt="...")` takes a prompt instead.'
            if self.takes_prompts
            else "The folder holds no text encoder, so it takes no other prompt."
        )
        return f"""---
license: {self.license}
library_name: diffusers
{base}pipeline_tag: {PIPELINE_TAG}
tags: [super-resolution, one-step-diffusion, qartsr]
---
# {self.title}

One-step diffusion super-resolution, x{self.scale}, in full precision (float32). {self.origin}

```python
from qartsr_pipeline import QArtSRPipeline

pipeline = QArtSRPipeline.from_pretrained("{self.title}")
pipeline(image).images[0]
```

One call of the UNet at T = {self.timestep} with the stored embedding of a fixed prompt. {prompts}

Quality and licence are those of the weights it was converted from; nothing was measured or trained in the conversion.
"""
