"""One interface on every release of diffusers, whichever is installed."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from group_offload import needs_group_offload
from transformers import CLIPTextModel

from qartsr_pipeline import QArtSRPipeline, versions
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline


@pytest.fixture
def old(monkeypatch):
    """As with the oldest release of both libraries."""
    monkeypatch.setattr(versions, "release", {"diffusers": (0, 35, 0), "transformers": (4, 51, 3)}.__getitem__)


def test_the_dtype_goes_by_the_name_that_the_release_knows(old, monkeypatch):
    for kind in (UNet2DConditionModel, CLIPTextModel, QArtSRPipeline):
        assert versions.dtype_argument(kind, torch.half) == {"torch_dtype": torch.half}
    monkeypatch.setattr(versions, "release", {"diffusers": (0, 39, 0), "transformers": (5, 0, 0)}.__getitem__)
    assert versions.dtype_argument(AutoencoderKL, torch.half) == {"torch_dtype": torch.half}
    assert versions.dtype_argument(CLIPTextModel, torch.half) == {"dtype": torch.half}


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_load_in_it(tiny_folder, name):
    assert QArtSRPipeline.from_pretrained(tiny_folder, **{name: torch.bfloat16}).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [QArtSRPipeline, LSGQuantVideoPipeline])
def test_diffusers_is_told_the_types_of_all_components(kind, tiny_pipeline):
    types = kind._get_signature_types()
    assert all(isinstance(one, type) for each in types.values() for one in each) and "self" not in types
    assert isinstance(tiny_pipeline.vae, types["vae"]) or kind is LSGQuantVideoPipeline


@needs_group_offload
def test_pipelines_of_old_releases_offload_groups(old, tiny_pipeline):
    image = torch.rand(1, 3, 16, 16)
    expected = tiny_pipeline(image, output_type="pt").images
    tiny_pipeline.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1, exclude_modules="prompt_embedding")
    assert any("_diffusers_hook" in vars(module) for module in tiny_pipeline.unet.modules())
    assert torch.equal(tiny_pipeline(image, output_type="pt").images, expected)
