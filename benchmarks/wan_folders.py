"""Folders at the size of WAN 2.1's 1.3 B model: bytes, seconds to convert, load and enlarge, peak memory, what folding removes.

    python -m benchmarks run wan-folders --folder DIR --output benchmarks/results/wan_folders_NAME.json

A diffusers folder of that shape with random weights in bfloat16 is converted as `qartsr convert wan` does, folded, and quantized
as the recipe lsgquant lays out its layers (rank 32, rotations at run time), without data: bounds from the weights' extremes,
branches of zeros. Then the folders are loaded by processes of their own in bfloat16, and enlarge frames of 128 x 128 to
512 x 512, one tile. The frames are noise: only bytes and seconds mean something.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import save_file

from benchmarks.full_size import peak_gigabytes
from benchmarks.result import Result, alone, markdown
from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.calibration.recipe_files import load_recipe
from qartsr_pipeline.calibration.report.pipeline_folder import folder_sizes
from qartsr_pipeline.calibration.start.schemes import fold_and_make_schemes
from qartsr_pipeline.convert.wan import convert_wan
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, calibrating_layers, prepare
from qartsr_pipeline.quantization.fold_wan import fold_wan
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.report import describe_model
from qartsr_pipeline.quantization.token_layers import TokenLinear

BLOCKS = 30
SHAPE = {  # of Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
}
TOKENS = 512  # that a prompt is padded to
SIDE = 128  # of the frames
TARGETS = {"folded away": 0.16, "of bf16": 0.25, "of bf16, with prompt": 0.27}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"of the transformer (default: {BLOCKS}, all of them)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=2, help="different ones in the prompt (default: 2, the empty prompt)"
    )
    parser.add_argument("--frames", type=int, default=5, help="that are enlarged (default: 5)")
    parser.add_argument("--repeats", type=int, default=1, help="calls after the first; the fastest counts (default: 1)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where 12 GB are free (default: a temporary folder)")


def write_base(folder: Path, blocks: int, tokens: int) -> None:
    """A diffusers folder in bfloat16, with the prompt's embedding where DOVE has it. Of each tensor one at a time is float32."""
    torch.manual_seed(0)
    with init_empty_weights():
        empty = WanTransformer3DModel(**SHAPE, num_layers=blocks)
    empty.save_config(folder / "transformer")
    AutoencoderKLWan().bfloat16().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    random = {}
    for name, tensor in empty.state_dict().items():
        values = torch.randn(tensor.shape) * max(tensor.shape[-1], 64) ** -0.5
        random[name] = (values + 1 if "norm" in name and name.endswith("weight") else values).bfloat16()
    save_file(random, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    embedding = torch.zeros(1, TOKENS, SHAPE["text_dim"])
    embedding[0, : tokens - 1] = torch.randn(tokens - 1, SHAPE["text_dim"])  # what follows is padding, the last kind of token
    (folder / "prompt_embeddings").mkdir()
    save_file({"prompt_embedding": embedding}, folder / "prompt_embeddings" / "prompt.safetensors")


def loaded(folder: Path) -> tuple[LSGQuantVideoPipeline, float]:
    """The pipeline in bfloat16, and the seconds that it took."""
    start = time.perf_counter()
    pipeline = LSGQuantVideoPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, time.perf_counter() - start


def convert(base: Path, target: Path) -> dict[str, float]:
    """What `qartsr convert wan` does; it writes float32."""
    start = time.perf_counter()
    convert_wan(base, target)
    return {"seconds to make": time.perf_counter() - start, "peak then, GB": peak_gigabytes("cpu")}


def quantize(full_precision: Path, target: Path) -> dict[str, float]:
    """W4A4 with the autoencoder at W8A8, from the weights alone."""
    pipeline, _ = loaded(full_precision)
    start = time.perf_counter()
    for component, scheme in fold_and_make_schemes(pipeline, load_recipe("lsgquant"), (4, 4)).items():
        model = prepare(getattr(pipeline, component), scheme, kinds=(TokenLinear, CalibratingConv2d))
        for layer in calibrating_layers(model).values():
            layer.set_weight_bounds_to_extremes()
        freeze(model, scheme)
    pipeline.save_pretrained(target)
    return {"seconds to make": time.perf_counter() - start, "peak then, GB": peak_gigabytes("cpu")}


@torch.inference_mode()
def use(folder: Path, frames: int, repeats: int, threads: int, folded: bool) -> dict[str, Any]:
    """Loads a folder, folds it if asked to, and enlarges a clip; seconds are for each frame, and those of the processor."""
    torch.set_num_threads(threads)
    pipeline, load = loaded(folder)
    found: dict[str, Any] = {"load, s": load}
    reports = {name: describe_model(name, getattr(pipeline, name)) for name in ("transformer", "vae")}
    found["parameters"] = {name: report.parameters for name, report in reports.items()}
    if folded:
        fold_wan(pipeline.transformer, pipeline.config["timestep"], pipeline.prompt_embedding(1))
        left = sum(tensor.numel() for tensor in pipeline.transformer.state_dict().values())
        found["folded away"] = 1 - left / found["parameters"]["transformer"]
    found["loaded, GB"] = sum(report.packed_bytes for report in reports.values()) / 1e9
    found["prepared, GB"] = sum(report.prepared_bytes for report in reports.values()) / 1e9
    clip = np.random.default_rng(0).random((frames, SIDE, SIDE, 3), dtype=np.float32)
    seconds = []
    for _ in range(1 + repeats):
        start = time.process_time()
        assert len(list(pipeline.stream(list(clip)))) == frames
        seconds.append((time.process_time() - start) / frames)
    found |= {"calls": len(seconds), "first call, s a frame": seconds[0], "s a frame": min(seconds)}
    return found | {"peak, GB": peak_gigabytes("cpu")}


def transformer_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))


def measure(args: argparse.Namespace) -> Result:
    """A row for the converted folder, for that folded in memory, and for the quantized one."""
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append({name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()})
        print(json.dumps(rows[-1]), flush=True)

    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        base, full, quantized = (Path(temporary) / name for name in ("base", "full-precision", "w4a4"))
        alone(write_base, base, args.blocks, args.prompt_tokens)
        bf16 = transformer_bytes(base)
        made = alone(convert, base, full)
        options = (args.frames, args.repeats, args.threads)
        sizes = {"folder, GB": folder_sizes(full)["total"] / 1e9, "transformer, GB": transformer_bytes(full) / 1e9}
        add({"name": "converted, folded when loaded", **sizes, **made, **alone(use, full, *options, True)})
        made = alone(quantize, full, quantized)
        sizes = {"folder, GB": folder_sizes(quantized)["total"] / 1e9, "transformer, GB": transformer_bytes(quantized) / 1e9}
        sizes["of bf16"] = transformer_bytes(quantized) / bf16
        prompt = folder_sizes(quantized).get("prompt_embedding", 0)
        sizes["of bf16, with prompt"] = (transformer_bytes(quantized) + prompt) / bf16
        add({"name": "W4A4, autoencoder W8A8", **sizes, **made, **alone(use, quantized, *options, False)})
    faster = rows[0]["s a frame"] / rows[1]["s a frame"]
    summary = {"bf16 transformer, GB": round(bf16 / 1e9, 3), "times faster": round(faster, 2), "targets": TARGETS}
    settings = {name: getattr(args, name) for name in ("blocks", "prompt_tokens", "frames", "repeats")}
    return Result("wan-folders", settings, rows, summary)


def table(result: Result) -> str:
    """Markdown."""
    keys = ["folder, GB", "transformer, GB", "seconds to make", "peak then, GB", "load, s", "loaded, GB", "prepared, GB"]
    keys += ["first call, s a frame", "s a frame", "peak, GB"]
    rows = [[row["name"], *(f"{row[key]:.2f}" if key in row else "" for key in keys)] for row in result.rows]
    full, quantized = result.rows
    targets = result.summary["targets"]
    shares = {"folded away": full["folded away"], **{key: quantized[key] for key in ("of bf16", "of bf16, with prompt")}}
    lines = [
        *(f"{name}: {share:.3f} (target {targets[name]:g})" for name, share in shares.items()),
        f"transformer in bfloat16: {result.summary['bf16 transformer, GB']:.2f} GB; times faster than that:"
        f" {result.summary.get('times faster', 'not measured')}. Seconds a frame are the processor's.",
    ]
    return "\n".join([markdown(["", *keys], rows), "", *lines])
