"""README.md of a quantized folder: what it was made of and how; its header is read by the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qartsr_pipeline.convert.model_card import PIPELINE_TAG, license_of, markdown_text, yaml_text


def model_card(record: dict[str, Any], source: Path, hub_id: str | None) -> str:
    """The file's content. Names that people chose are escaped.

    Args:
        record: the content of `quantization.json`.
        source: the full-precision folder, whose card names the licence.
        hub_id: of the full-precision model, where it came from the Hub.
    """
    bits, recipe, data = markdown_text(record["bits"].upper()), record["recipe"], record["data"]
    images = f"{data['count']} photographs" if "count" in data else "procedural images"
    base = f"base_model: {yaml_text(hub_id)}\n" if hub_id else ""
    trained = f"{recipe['steps']} steps, seed {record['seed']}, " if recipe["stages"] else ""
    name, made = markdown_text(record["model"]), f"{markdown_text(recipe['method'])} ({markdown_text(recipe['source'])})"
    return f"""---
license: {yaml_text(license_of(source / "README.md") or "other")}
library_name: diffusers
{base}pipeline_tag: {PIPELINE_TAG}
tags: [super-resolution, one-step-diffusion, quantized, qartsr]
---
# {name}, {bits}

{_code(record["model"])}, quantized to {bits} (bits of weights and activations; each component's `config.json` says which
layers have others), constants of timestep and prompt folded: it takes no other prompt.

```python
from qartsr_pipeline import QArtSRPipeline

pipeline = QArtSRPipeline.from_pretrained("FOLDER")
pipeline(image).images[0]
```

Recipe {made}, {trained}on {images}. `quantization.json` has the whole record: recipe, versions, data,
losses, every layer's error. The licence is that of the full-precision model.
"""


def _code(text: str) -> str:
    """A code span of one line."""
    return "`" + " ".join(text.split()).replace("`", "'") + "`"
