"""What a model is said to cost."""

from __future__ import annotations

import torch
from quantized_models import quantized_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qartsr_pipeline.quantization.accounting import Accounting, account, run_on_meta, unquantized_twin
from qartsr_pipeline.quantization.deployed import DeployedLayer
from tiny_models import build_tiny_pipeline


def test_bytes_are_those_of_the_files(tmp_path):
    pipeline = quantized_pipeline()
    pipeline.save_pretrained(tmp_path)
    files = [path.stat().st_size for part in ("unet", "vae") for path in (tmp_path / part).glob("*.safetensors")]
    counted = account(pipeline.unet, pipeline.vae)
    assert counted.stored == sum(files) == account(pipeline.unet, pipeline.vae, files).stored
    whole = build_tiny_pipeline()
    assert counted.parameters == sum(p.numel() for model in (whole.unet, whole.vae) for p in model.parameters())
    assert counted.bits == 8 * sum(files) / counted.parameters
    assert Accounting.from_dict(counted.to_dict()).to_dict() == counted.to_dict()


def test_multiplications_are_those_that_pytorch_counts():
    whole = build_tiny_pipeline()
    unet, vae = unquantized_twin(whole.unet), unquantized_twin(whole.vae)
    layers, products = run_on_meta(unet, vae, side=64)
    found = sum(positions.multiplications(weights) for positions, weights in layers.values()) + products
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):  # the others are not counted
        latents = whole.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mode()
        whole.vae.decode(whole.unet(latents, 0, encoder_hidden_states=torch.zeros(1, 77, 16)).sample)
    assert found == counter.get_total_flops() // 2


def test_every_multiplication_has_a_kind():
    pipeline = quantized_pipeline()
    counted, whole = account(pipeline.unet, pipeline.vae), build_tiny_pipeline()
    plain = account(whole.unet, whole.vae)
    assert plain.stated is None and set(plain.multiplications) == {"float"} and plain.shares()["float"] == 1
    assert abs(sum(counted.shares().values()) - 1) < 1e-9 and counted.stated == "w6a6"
    assert (
        all(counted.shares()[kind] for kind in ("wider", "branch", "float")) and counted.branch_cost > counted.shares()["branch"]
    )
    without_branch = sum(count for kind, count in counted.multiplications.items() if kind != "branch")
    assert without_branch < plain.multiplications["float"]  # what is folded is not run
    layers = [layer for model in (pipeline.unet, pipeline.vae) for layer in model.modules() if isinstance(layer, DeployedLayer)]
    assert (counted.multiplications.get("branch", 0) > 0) == any(
        layer.spec.rank for layer in layers if layer.spec.weight_bits < 16
    )
    assert counted.code_weights == sum(layer.spec.out_channels * layer.spec.in_channels * layer.spec.taps for layer in layers)
