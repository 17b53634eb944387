"""Quantized folders through stock diffusers: bit for bit, in every load dtype, and again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from quantized_models import deployed_layers, picture, quantized_pipeline, run, scheme_of
from safetensors.torch import load_file
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.versions import dtype_argument

WEIGHTS = "diffusion_pytorch_model.safetensors"
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[QArtSRPipeline, Path]:
    """A quantized pipeline and the folder it was saved to. Tests only read them."""
    pipeline = quantized_pipeline()
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return pipeline, folder


def assert_same_tensors(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert set(ours) == set(theirs)
    assert not [n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])]


@pytest.mark.parametrize(("name", "kind"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
@torch.no_grad()
def test_stock_classes_load_every_bit(saved, tmp_path: Path, name: str, kind: type):
    pipeline, folder = saved
    original = getattr(pipeline, name)
    loaded = kind.from_pretrained(folder / name)
    assert type(loaded) is kind and not loaded.training
    assert_same_tensors(loaded, original)
    assert torch.equal(run(loaded), run(original))
    specs = {n: layer.spec for n, layer in deployed_layers(original).items()}
    assert specs == {n: layer.spec for n, layer in deployed_layers(loaded).items()}
    assert len({(s.weight_bits, s.activation_bits) for s in specs.values()}) >= 3
    assert loaded.hf_quantizer.quantization_config.scheme() == scheme_of(pipeline_folding(pipeline, name))
    loaded.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / name / WEIGHTS).read_bytes()
    assert_same_tensors(kind.from_pretrained(tmp_path), original)


def pipeline_folding(pipeline: QArtSRPipeline, name: str):
    return pipeline.unet.hf_quantizer.quantization_config.scheme().folding if name == "unet" else None


def test_the_whole_pipeline_gives_the_same_picture(saved):
    pipeline, folder = saved
    loaded = QArtSRPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    image = (picture() + 1) / 2
    assert torch.equal(*(p(image, output_type="pt").images for p in (pipeline, loaded)))


def watch_layers(model: nn.Module, reference: nn.Module) -> dict[str, float]:
    """Filled while ``model`` runs: relative error of each of its layers against the reference's, given the same input."""
    errors = {}

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            expected = layer(inputs[0].float())
            errors[name] = ((output.float() - expected).norm() / expected.norm()).item()

        model.get_submodule(name).register_forward_hook(hook)

    for name, layer in deployed_layers(reference).items():
        watch(name, layer)
    return errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_stored_dtypes_survive_every_load_dtype(saved, dtype: torch.dtype):
    pipeline, folder = saved
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        original, loaded = getattr(pipeline, name), kind.from_pretrained(folder / name, **dtype_argument(kind, dtype))
        assert loaded.dtype == dtype
        for layer_name, layer in deployed_layers(original).items():
            assert_same_tensors(loaded.get_submodule(layer_name), layer)
        inside = {f"{layer_name}.{b}" for layer_name, layer in deployed_layers(loaded).items() for b in layer.state_dict()}
        assert {t.dtype for n, t in loaded.state_dict().items() if n not in inside} == {dtype}
        # layer by layer: through a random network of few bits, one code that rounds the other way changes all that follow
        errors = watch_layers(loaded, original)
        assert run(loaded).dtype == dtype
        assert len(errors) == len(deployed_layers(original)) and max(errors.values()) < torch.finfo(dtype).eps
        with pytest.raises(ValueError, match="quantized"):
            loaded.to(torch.float32)


def test_large_models_saved_in_parts_load_too(saved, tmp_path: Path):
    pipeline, _ = saved
    pipeline.vae.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    assert_same_tensors(AutoencoderKL.from_pretrained(tmp_path), pipeline.vae)


def test_packed_bytes_are_what_the_file_holds(saved):
    pipeline, folder = saved
    stored = load_file(folder / "vae" / WEIGHTS)
    layers = deployed_layers(pipeline.vae)
    inside = [t for n, t in stored.items() if n.rpartition(".")[0] in layers]
    assert sum(t.numel() * t.element_size() for t in inside) == sum(layer.packed_bytes for layer in layers.values())


def test_a_fresh_process_loads_with_stock_diffusers(saved):
    """After one import, in whatever order, and without optimum-quanto, which deployed models do not need."""
    _, folder = saved
    code = (
        "import sys; sys.modules['optimum.quanto'] = None\n"
        "from diffusers import AutoencoderKL\n"
        "from qartsr_pipeline import QArtSRPipeline\n"
        f"vae = AutoencoderKL.from_pretrained({str(folder / 'vae')!r})\n"
        "print(type(vae.decoder.conv_in).__name__, vae.decoder.conv_in.weight_packed.dtype)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DeployedConv2d", "torch.uint8"]
