"""Quantizes a full-precision pipeline: observers, low-rank branch, bounds, then end-to-end training of these if asked for.

    python calibration/quantize.py MODEL --bits w4a4 --data PHOTOS --output FOLDER

What it writes is a complete pipeline folder, with `quantization.json` beside it that records how it was made.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from calibration.data.dead_leaves import DeadLeaves
from calibration.data.degradations import bicubic_degradation
from calibration.data.fingerprint import data_fingerprint, versions
from calibration.data.photographs import PhotographPatches, list_photographs
from calibration.extended import Extended, train
from calibration.initialise import BOUNDS, Initialisation, initialise
from calibration.observers import observe
from calibration.pipeline_folder import check_target, save_pipeline
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers

RECORD_NAME = "quantization.json"
# The first layer sees the picture and the last one makes it: kept at 8 bits, as is the field's custom.
ENDS = {"unet": ("conv_in", "conv_out"), "vae": ("encoder.conv_in", "decoder.conv_out")}


def parse_bits(text: str) -> tuple[int, int]:
    """ "w4a4" -> (4, 4).

    Raises:
        ValueError: if it is not of that form.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
    if not match:
        raise ValueError(f"bits are {text!r}, expected a form such as w4a4 or w8a8")
    return int(match[1]), int(match[2])


def parse_kept(text: str) -> tuple[str, LayerScheme | None]:
    """ "decoder.*=w8a8" -> a pattern of layer names and their scheme; "w16a16" leaves layers as they are."""
    pattern, equals, bits = text.partition("=")
    if not (pattern and equals):
        raise ValueError(f"{text!r} is not of the form PATTERN=BITS, such as decoder.*=w8a8")
    scheme = LayerScheme(*parse_bits(bits))
    return pattern, None if scheme.changes_nothing else scheme


def fold_and_make_schemes(
    pipeline: QArtSRPipeline, bits: tuple[int, int], rank: int, kept: list[tuple[str, LayerScheme | None]] = ()
) -> dict[str, QuantizationScheme]:
    """Folds the UNet's constants in place, and gives the schemes of UNet and VAE.

    Args:
        bits: of weights and activations.
        rank: of the low-rank branch.
        kept: patterns of layer names that are quantized otherwise, before all others.

    Raises:
        ValueError: if the pipeline is quantized already.
    """
    if any(getattr(getattr(pipeline, name), "is_quantized", False) for name in ENDS):
        raise ValueError("the model is quantized already; quantize the full-precision model that it was made from")
    folding = fold(pipeline.unet, pipeline.config.timestep, pipeline.prompt_embedding(1))
    end = LayerScheme(max(8, bits[0]), max(8, bits[1]))
    return {
        name: QuantizationScheme(
            LayerScheme(*bits, rank), dict(kept) | dict.fromkeys(ends, end), folding if name == "unet" else None
        )
        for name, ends in ENDS.items()
    }


def quantize(
    pipeline: QArtSRPipeline,
    schemes: dict[str, QuantizationScheme],
    batches: list[torch.Tensor],
    options: Initialisation,
    refine: Callable[[QArtSRPipeline], object] | None = None,
    adapter_rank: int = 0,
) -> dict[str, float]:
    """Quantizes UNet and VAE in place.

    Args:
        batches: low-resolution calibration pictures, (B, 3, h, w) in [0, 1].
        refine: trains the calibrating pipeline before it is frozen.
        adapter_rank: of the adapters merged into the weights, for training.

    Returns:
        "component.layer" -> relative squared error of that layer's output alone.
    """
    models = {name: getattr(pipeline, name) for name in schemes}
    layers = {
        f"{component}.{name}": layer
        for component, model in models.items()
        for name, (layer, _) in quantizable_layers(model, schemes[component]).items()
    }
    samples = observe(layers, lambda low: pipeline(low, color_fix=None, output_type="pt"), tqdm(batches, desc="observe"))
    errors = {}
    for component, model in models.items():
        prepare(model, schemes[component], adapter_rank)
        found = calibrating_layers(model)
        prefix = f"{component}."
        own = {name.removeprefix(prefix): s for name, s in samples.items() if name.startswith(prefix)}
        for name, error in initialise(found, own, options).items():
            errors[prefix + name] = error
    if refine is not None:
        refine(pipeline)
    for component, model in models.items():
        freeze(model, schemes[component])
    return errors


def calibration_batches(patches: object, count: int, size: int, seed: int, batch: int = 4) -> list[torch.Tensor]:
    """``count`` low-resolution patches of ``size`` / 4 pixels, in batches; ``patches`` is anything with `sample`."""
    rng = np.random.default_rng(seed)
    return [bicubic_degradation(patches.sample(min(batch, count - start), size, rng)) for start in range(0, count, batch)]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of the full-precision pipeline")
    parser.add_argument("--bits", default="w4a4", help="of weights and activations: 2, 3, 4, 6, 8, or 16 for none")
    parser.add_argument("--keep", nargs="+", default=[], metavar="PATTERN=BITS", help="layers with other bits: decoder.*=w8a8")
    parser.add_argument("--rank", type=int, default=8, help="of the 16-bit branch, 0 for none")
    parser.add_argument("--bounds", choices=BOUNDS, default="mse", help="percentiles are of inputs; weights then keep extremes")
    parser.add_argument("--percentile", type=float, default=Initialisation.percentile)
    parser.add_argument("--data", help="folder of photographs; without it, procedural pictures are used")
    parser.add_argument("--patches", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=256, help="of the high-resolution patches, in pixels")
    parser.add_argument("--train-steps", type=int, default=0, help="of end-to-end training of the quantization parameters")
    parser.add_argument("--adapter-rank", type=int, default=4, help="of the adapters merged into the weights, when training")
    parser.add_argument("--lr", type=float, default=Extended.lr, help="of that training, relative to what is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="the pipeline folder to write")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, once its arguments are parsed."""
    check_target(Path(args.output))
    options = Initialisation(bounds=args.bounds, percentile=args.percentile)
    bits, kept = parse_bits(args.bits), [parse_kept(text) for text in args.keep]
    pipeline = QArtSRPipeline.from_pretrained(args.model)
    pipeline.set_progress_bar_config(disable=True)
    if args.data:
        paths = list_photographs(args.data)
        source, data = PhotographPatches(paths), data_fingerprint(paths)
    else:
        source, data = DeadLeaves(), {"procedural": "dead leaves"}
    schemes = fold_and_make_schemes(pipeline, bits, args.rank, kept)
    batches = calibration_batches(source, args.patches, args.patch_size, args.seed)
    settings, losses = Extended(steps=args.train_steps, lr=args.lr), []

    def refine(calibrating: QArtSRPipeline) -> None:
        losses.extend(train(calibrating, QArtSRPipeline.from_pretrained(args.model), source, settings, args.seed))

    trained = args.train_steps > 0
    errors = quantize(pipeline, schemes, batches, options, refine if trained else None, args.adapter_rank if trained else 0)
    record = {
        "command": vars(args) | {"model": Path(args.model).name, "output": Path(args.output).name, "data": data},
        "initialisation": asdict(options),
        "extended_training": asdict(settings) | {"loss": [round(loss, 8) for loss in losses]},
        "versions": versions(),
        "relative_error_of_each_layer_alone": {name: round(error, 6) for name, error in errors.items()},
    }
    sizes = save_pipeline(pipeline, args.output, RECORD_NAME, record)
    print(f"written: {args.output}, {sizes['total'] / 1e6:.2f} MB")


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
