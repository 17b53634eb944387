"""Compares quantization methods on one model: the same data and number of steps, each on its own grid, learning rates swept.

    python calibration/compare.py tiny-fp --data PHOTOS --evaluate OTHERS --steps 60 --bits w4a4 w2a2 --output FOLDER

A cell is one method at one bit width with one seed. Finished cells are JSON files in FOLDER/cells, and are not made again: call
the same command again after Ctrl-C or a crash. At the end, or with --table-only, FOLDER gets comparison.md, comparison.json and a
sheet of pictures for each bit width. Nothing is ever chosen on the photographs of --evaluate but which cells get more seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from calibration.comparison_table import MAIN, full_precision_name, read_cells, write_tables
from calibration.data.fingerprint import data_fingerprint, hardware, versions
from calibration.data.overlap import file_digests, overlap
from calibration.data.pairs import choose_held_out, held_out_pairs
from calibration.data.photographs import PhotographPatches, list_photographs
from calibration.engine import Calibrated, all_layers, quantize, weights_digest
from calibration.evaluation import Candidate, evaluate_pipelines
from calibration.evaluation_report import mean, summarize
from calibration.losses import Perceptual, load_perceptual
from calibration.network_run import picture_of
from calibration.perceptual_metrics import NAMES, load_metrics
from calibration.recipe import Recipe, Stage, load_recipe, parse_bits
from calibration.training_state import write_whole
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.command_line.device import choose_device

METHODS = ("maxmin", "lsq", "q_dm", "efficientdm", "passionsr", "svdquant", "qartsr")
EXTRA_BITS = {"passionsr": "w8a8"}  # what its publication is about
SWEPT = (0.3, 1.0, 3.0)  # factors of the recipe's learning rates; when the best is at an end, the search goes on behind it
FURTHER = {0.3: (0.1, 0.03), 3.0: (10.0, 30.0)}
SWEEP_SHARE = 1 / 3  # of the steps
HELD_OUT = 8  # photographs of --data that are not calibrated on: they choose the learning rate
REPEATED = 3  # so many of the best methods are repeated with further seeds
BESIDE_MAIN = 2  # so many of the best other methods are also measured on the model before TRQ
COLOR_FIXES = ("wavelet", None)  # the pipeline's default, and the network's own colours
FULL_PRECISION = "full precision"
CROP = 192  # pixels, of the sheet's pictures


class StoppedError(Exception):
    """Ctrl-C; what is finished is saved."""


def _without(recipe: Recipe, part: str, **layer: Any) -> Recipe:
    """The recipe without one kind of parameter."""
    stages = (replace(stage, train=tuple(p for p in stage.train if p != part)) for stage in recipe.stages)
    return replace(recipe, layer=replace(recipe.layer, **layer), stages=tuple(s for s in stages if s.train))


def _per_module(recipe: Recipe, change: Callable[[Stage], Stage]) -> Recipe:
    """The recipe with its per-module stages changed."""
    return replace(recipe, stages=tuple(s if s.modules == "all" else change(s) for s in recipe.stages))


def _jointly(stage: Stage) -> Stage:
    return replace(stage, modules="all", loss={k: v for k, v in stage.loss.items() if k != "module_l2"})


def _only_per_module(recipe: Recipe) -> Recipe:
    """Without the stages that train everything at once; their steps go to the others."""
    stages = [stage for stage in recipe.stages if stage.modules != "all"]
    shares = sum(stage.share for stage in stages)
    return replace(recipe, stages=tuple(replace(stage, share=stage.share / shares) for stage in stages))


# Name on the command line -> label in tables, and what is changed of the main recipe.
ABLATIONS: dict[str, tuple[str, Callable[[Recipe], Recipe]]] = {
    "qartsr-forward": ("forward order", partial(_per_module, change=lambda stage: replace(stage, order="forward"))),
    "qartsr-joint": ("joint instead of per module", partial(_per_module, change=_jointly)),
    "qartsr-no-et": ("no ET", _only_per_module),
    "qartsr-no-branch": ("no branch", partial(_without, part="branch", branch_rank=0)),
    "qartsr-no-smoothing": ("no smoothing", partial(_without, part="smoothing", smoothing="none")),
    "qartsr-no-adapter": ("no adapter", partial(_without, part="adapter", adapter_rank=0)),
}
# A method's published rank is another thing where layers have 16 to 96 channels: also with the main method's rank.
SAME_RANK = "svdquant-same-rank"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: on the command line and in file names.
        label: in tables.
        kind: "method" or "ablation".
    """

    name: str
    label: str
    kind: str
    recipe: Recipe = field(compare=False)  # told by the name; holds dictionaries, which have no hash


def method_names() -> tuple[str, ...]:
    """Everything that --methods takes."""
    return (*METHODS, SAME_RANK, *ABLATIONS)


def make_method(name: str, steps: int) -> Method:
    """One of `method_names`, with so many steps if it trains."""
    if name in ABLATIONS:
        label, change = ABLATIONS[name]
        kind, recipe = "ablation", change(load_recipe(MAIN))
    elif name == SAME_RANK:
        kind, recipe, rank = "method", load_recipe("svdquant"), load_recipe(MAIN).layer.branch_rank
        label, recipe = f"{recipe.method}, rank {rank}", replace(recipe, layer=replace(recipe.layer, branch_rank=rank))
    else:
        kind, recipe = "method", load_recipe(name)
        label = recipe.method
    return Method(name, label, kind, replace(recipe, steps=steps if recipe.stages else 0))


@dataclass(frozen=True)
class Cell:
    """What is made and measured once.

    Attributes:
        model: "" for the model itself, "t999" for the one before TRQ.
    """

    method: Method
    bits: str
    seed: int = 0
    model: str = ""

    @property
    def group(self) -> str:
        """Name without the seed: cells of a group share a learning rate."""
        return "-".join(filter(None, (self.method.name, self.bits, self.model)))

    @property
    def key(self) -> str:
        return f"{self.group}-seed{self.seed}"


@dataclass
class Model:
    """A full-precision model, its outputs on the evaluation pictures, and its pictures of the held-out patches."""

    pipeline: QArtSRPipeline
    device: str
    digest: str
    perceptual: Perceptual
    references: dict[Path, list[torch.Tensor]] = field(default_factory=dict)
    held_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def fresh(self) -> QArtSRPipeline:
        """Another instance, to be quantized."""
        return copy.deepcopy(self.pipeline)


def load_model(name: str, device: str) -> Model:
    """Raises ValueError if the model is quantized already, and see `QArtSRPipeline.from_pretrained`."""
    pipeline = QArtSRPipeline.from_pretrained(fetch(name)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if any(getattr(model, "is_quantized", False) for model in (pipeline.unet, pipeline.vae)):
        raise ValueError(f"{name} is quantized already: compare on the full-precision model")
    return Model(pipeline, device, weights_digest(pipeline), load_perceptual("encoder", pipeline.vae))


@dataclass
class Comparison:
    """Everything that cells are made from.

    Attributes:
        models: "" and, where it is given, "t999".
        data: fingerprints, for the settings of every cell.
    """

    output: Path
    models: dict[str, Model]
    patches: PhotographPatches
    held_out: list[Path]
    evaluation: list[Path]
    data: dict[str, Any]
    metrics: list[str]
    device: str

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What a cell's numbers depend on, as JSON types."""
        settings = {"recipe": cell.method.recipe.to_dict(), "bits": cell.bits, "seed": cell.seed, "metrics": self.metrics}
        return json.loads(json.dumps(settings | {"model": self.models[cell.model].digest} | self.data))

    def finished(self, path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
        """A file's content if it is there.

        Raises:
            ValueError: it is of other settings, or damaged; the message names the file.
        """
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            other = difference(content["settings"], settings)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read as a cell ({type(error).__name__}): remove it to make it again") from error
        if other:
            raise ValueError(f"{path} was made with other settings, {other}: choose another --output, or remove the file")
        return content


def difference(there: Any, asked: Any, where: str = "") -> str:
    """The first entry in which two JSON values differ, for a message; "" if they are equal."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in [*there, *(key for key in asked if key not in there)]:
            found = difference(there.get(key), asked.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        return next(
            filter(None, (difference(*pair, f"{where}.{i}") for i, pair in enumerate(zip(there, asked, strict=True)))), ""
        )
    return "" if there == asked else f"{where} is {json.dumps(there)} there and {json.dumps(asked)} here"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def with_rate(recipe: Recipe, factor: float, share: float = 1.0) -> Recipe:
    """The recipe with all learning rates times ``factor`` and its steps times ``share``."""
    stages = tuple(replace(stage, lr=stage.lr * factor) for stage in recipe.stages)
    return replace(recipe, stages=stages, steps=math.ceil(recipe.steps * share))


def calibrate(comparison: Comparison, cell: Cell, recipe: Recipe, name: str) -> tuple[QArtSRPipeline, Calibrated]:
    """Quantizes the cell's model in simulation.

    Args:
        name: of the file that holds the state in between.

    Raises:
        StoppedError: by Ctrl-C; the state is saved.
    """
    model = comparison.models[cell.model]
    pipeline = model.fresh()
    state = comparison.output / "states" / f"{name}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    calibrated = quantize(
        pipeline,
        model.pipeline,
        recipe,
        parse_bits(cell.bits),
        comparison.patches,
        cell.seed,
        state,
        perceptual=model.perceptual if any(stage.loss.get("perceptual") for stage in recipe.stages) else None,
    )
    if calibrated.stopped:
        raise StoppedError
    state.unlink(missing_ok=True)
    return pipeline, calibrated


@torch.no_grad()
def held_out_loss(comparison: Comparison, model: Model, pipeline: QArtSRPipeline) -> float:
    """Mean squared distance to full precision's pictures of the held-out patches, in [-1, 1]."""
    if not model.held_out:
        pairs = held_out_pairs(comparison.held_out, "bicubic")
        model.held_out = [(up.to(model.device), picture_of(model.pipeline, up.to(model.device))) for up, _ in pairs]
    losses = [float(F.mse_loss(picture_of(pipeline, up), wanted)) for up, wanted in model.held_out]
    loss = sum(losses) / len(losses)
    return loss if math.isfinite(loss) else math.inf


def sweep(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """Chooses the learning rate of a cell's group with a few steps, by the distance to full precision on held-out patches.

    Returns:
        "factor", and "losses" by factor (None where training diverged).

    Raises:
        ValueError: training diverged with every rate. StoppedError: by Ctrl-C.
    """
    first = replace(cell, seed=0)
    settings = comparison.settings(first) | {"factors": list(SWEPT), "share": SWEEP_SHARE, "metrics": None}
    path = comparison.output / "sweeps" / f"{cell.group}.json"
    known = comparison.finished(path, settings)
    if known:
        return known
    losses = {factor: _short_run(comparison, first, factor) for factor in SWEPT}
    best = min(losses, key=losses.__getitem__)
    for factor in FURTHER.get(best, ()) if losses[best] < math.inf else ():
        losses[factor] = _short_run(comparison, first, factor)
        if losses[factor] >= losses[best]:
            break
        best = factor
    if losses[best] == math.inf:
        raise ValueError(f"{cell.group}: training diverges with the recipe's learning rates times {', '.join(map(str, SWEPT))}")
    shown = {f"{factor:g}": losses[factor] if math.isfinite(losses[factor]) else None for factor in sorted(losses)}
    chosen = {"settings": settings, "factor": best, "losses": shown}
    write_json(path, chosen)
    return chosen


def _short_run(comparison: Comparison, cell: Cell, factor: float) -> float:
    """Loss on held-out patches after a part of the steps with learning rates times ``factor``; infinite if training diverges."""
    recipe = with_rate(cell.method.recipe, factor, SWEEP_SHARE)
    try:
        pipeline, _ = calibrate(comparison, cell, recipe, f"sweep-{cell.group}-x{factor:g}")
    except FloatingPointError:
        return math.inf
    return held_out_loss(comparison, comparison.models[cell.model], pipeline)


def stored_size(pipeline: QArtSRPipeline) -> dict[str, float]:
    """What the quantized layers take: codes, 16-bit branches and one 16-bit number a weight scale.

    Returns:
        "megabytes" (10^6 bytes) and "bits_a_weight".
    """
    bits = weights = 0
    for layer in all_layers(pipeline).values():
        weight, scheme = layer.weight, layer.layer_scheme
        channels = weight.shape[1]
        size = getattr(layer, "group_size", 0)
        scales = weight.numel() // channels * -(-channels // size) if size else weight.shape[0]
        weights += weight.numel()
        bits += weight.numel() * scheme.weight_bits + (16 * scales if scheme.weight_bits < 16 else 0)
        if layer.has_branch:
            bits += 16 * (layer.branch_up.numel() + layer.branch_down.numel())
    return {"megabytes": round(bits / 8e6, 4), "bits_a_weight": round(bits / weights, 3)}


def measured(rows: list, name: str) -> dict[str, dict[str, Any]]:
    """Colour alignment ("none" without) -> metrics of the model ``name``, means and picture by picture."""
    lines = {line["color_fix"] or "none": line for line in summarize(rows) if line["kind"] == "model" and line["name"] == name}
    return {color_fix: {k: _rounded(v) for k, v in line.items() if k not in _NO_METRICS} for color_fix, line in lines.items()}


_NO_METRICS = ("name", "kind", "color_fix", "full_precision")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value


def evaluate(comparison: Comparison, model: Model, candidate: Candidate, made: Callable[..., None]) -> list:
    """Rows of one pipeline on the evaluation pictures, compared with the model's full-precision outputs."""
    metrics = load_metrics(comparison.metrics, comparison.device)
    with tqdm(total=len(comparison.evaluation), desc=f"measure {candidate.name}", unit="picture", leave=False) as bar:

        def seen(path: Path, name: str, picture: torch.Tensor) -> None:
            bar.update(name == "original")
            made(path, name, picture)

        return evaluate_pipelines(
            [candidate], comparison.evaluation, COLOR_FIXES, metrics=metrics, references=model.references, made=seen
        )


def save_crop(path: Path, picture: torch.Tensor, box: list[int]) -> None:
    """Writes a part of (1, 3, H, W) in [0, 1] as PNG; ``box`` is left, top and side."""
    left, top, side = box
    pixels = (picture[0, :, top : top + side, left : left + side].permute(1, 2, 0).clamp(0, 1) * 255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.cpu().numpy()).save(path)


def most_restored(bicubic: torch.Tensor, restored: torch.Tensor) -> tuple[float, list[int]]:
    """Where two pictures (1, 3, H, W) differ most: mean absolute difference there, and left, top and side of the square."""
    changed = (restored - bicubic).abs().mean(1, keepdim=True)
    side = min(CROP, *changed.shape[-2:])
    means = F.avg_pool2d(changed, side, stride=8)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return float(means.max()), [left * 8, top * 8, side]


def full_precision(comparison: Comparison, name: str, again: bool = False) -> dict[str, Any]:
    """How a full-precision model does, and which part of which picture the sheet shows: measured, or read where it was.

    Args:
        again: measure anyway, so that its outputs are at hand for cells to be compared with.
    """
    model = comparison.models[name]
    path = comparison.output / full_precision_name(name)
    settings = json.loads(json.dumps({"model": model.digest, "metrics": comparison.metrics} | comparison.data))
    known = comparison.finished(path, settings)
    if known and not again:
        return known
    best: dict[str, Any] = {"difference": -1.0}
    pictures: dict[str, torch.Tensor] = {}

    def made(where: Path, what: str, picture: torch.Tensor) -> None:
        pictures[what] = picture
        if what == "original":
            changed, box = most_restored(pictures["bicubic"], pictures[FULL_PRECISION])
            if changed > best["difference"]:
                best.update(difference=changed, picture=where.name, box=box, shown=dict(pictures))

    rows = evaluate(comparison, model, Candidate(FULL_PRECISION, model.pipeline, True), made)
    if not name:
        for what, picture in best["shown"].items():
            save_crop(comparison.output / "crops" / f"{what.replace(' ', '-')}.png", picture, best["box"])
    bicubic = next(row for row in rows if row.kind == "bicubic")
    content = {
        "settings": settings,
        "timestep": model.pipeline.config.timestep,
        "sheet": {"picture": best["picture"], "box": best["box"]},
        "bicubic": {metric: mean(values) for metric, values in bicubic.values.items()},
        "metrics": measured(rows, FULL_PRECISION),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content


def run_cell(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """Makes and measures a cell, or reads it where it is finished.

    Raises:
        ValueError: it is there, of other settings. StoppedError: by Ctrl-C; what is done of it is saved.
    """
    settings = comparison.settings(cell)
    path = comparison.output / "cells" / f"{cell.key}.json"
    known = comparison.finished(path, settings)
    if known:
        return known
    start = time.perf_counter()
    model = comparison.models[cell.model]
    if not model.references:
        full_precision(comparison, cell.model, again=True)
    chosen = sweep(comparison, cell) if cell.method.recipe.stages else {"factor": None, "losses": {}}
    recipe = with_rate(cell.method.recipe, chosen["factor"] or 1.0)
    pipeline, calibrated = calibrate(comparison, cell, recipe, cell.key)
    sheet = None if cell.model else full_precision(comparison, "")["sheet"]

    def made(where: Path, what: str, picture: torch.Tensor) -> None:
        if sheet and where.name == sheet["picture"] and what == cell.method.label:
            save_crop(comparison.output / "crops" / f"{cell.key}.png", picture, sheet["box"])

    rows = evaluate(comparison, model, Candidate(cell.method.label, pipeline, False), made)
    content = {
        "method": cell.method.name,
        "label": cell.method.label,
        "kind": cell.method.kind,
        "bits": cell.bits,
        "seed": cell.seed,
        "model": cell.model,
        "settings": settings,
        "learning_rate": {"factor": chosen["factor"], "held_out_losses": chosen["losses"]},
        "perceptual": model.perceptual.name if any(stage.loss.get("perceptual") for stage in recipe.stages) else None,
        "losses": {stage: [float(f"{loss:.4g}") for loss in losses] for stage, losses in calibrated.losses.items()},
        "layer_errors": {name: float(f"{error:.4g}") for name, error in calibrated.layer_errors.items()},
        "metrics": measured(rows, cell.method.label),
        **stored_size(pipeline),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content


def first_cells(methods: list[Method], bits: list[str]) -> list[Cell]:
    """Every method at every bit width, and what a method's own publication is about."""
    cells = [Cell(method, width) for width in bits for method in methods]
    extra = [Cell(method, EXTRA_BITS[method.name]) for method in methods if method.name in EXTRA_BITS]
    return cells + [cell for cell in extra if cell not in cells]


def further_cells(done: dict[Cell, dict[str, Any]], seeds: int, before_trq: bool) -> list[Cell]:
    """The best methods with further seeds, and the main one and the best others on the model before TRQ."""
    cells = []
    for bits in dict.fromkeys(cell.bits for cell in done):
        rivals = [cell for cell in done if cell.bits == bits and cell.method.kind == "method"]
        if len(rivals) < 2:
            continue
        ranked = sorted(rivals, key=lambda cell: -done[cell]["metrics"]["wavelet"]["psnr_y_to_full_precision"])
        cells += [replace(cell, seed=seed) for cell in ranked[:REPEATED] for seed in range(1, seeds)]
        if before_trq:
            main = [cell for cell in ranked if cell.method.name == MAIN]
            others = [cell for cell in ranked if cell.method.name != MAIN][:BESIDE_MAIN]
            cells += [replace(cell, model="t999") for cell in main + others]
    return cells


def prepare(args: argparse.Namespace) -> Comparison:
    """Checks the arguments and loads models and data.

    Raises:
        ValueError, OSError, ImportError: the message says which argument is wrong.
    """
    device, _ = choose_device(args.device)
    paths, evaluation = list_photographs(args.data), list_photographs(args.evaluate)[: args.limit]
    seen = overlap(evaluation, file_digests(paths))
    if seen:
        raise ValueError(f"{seen[0]} is among the photographs of --data: evaluate on others")
    if len(paths) <= HELD_OUT:
        raise ValueError(f"{args.data} has {len(paths)} photographs; more than {HELD_OUT} are needed, which are held out")
    load_metrics(args.metrics, device)
    held_out = choose_held_out(paths, HELD_OUT)
    names = {"": args.model} | ({"t999": args.model_t999} if args.model_t999 else {})
    models = {name: load_model(folder, device) for name, folder in names.items()}
    data = {"calibration": data_fingerprint(paths), "evaluation": data_fingerprint(evaluation), "degradation": "bicubic"}
    patches = PhotographPatches([path for path in paths if path not in set(held_out)])
    return Comparison(args.output, models, patches, held_out, evaluation, data, args.metrics, device)


def run(args: argparse.Namespace) -> None:
    """Makes what is missing, then the tables."""
    if not args.table_only:
        methods = [make_method(name, args.steps) for name in args.methods]
        comparison = prepare(args)
        for name in comparison.models:
            full_precision(comparison, name)
        done = run_cells(comparison, first_cells(methods, args.bits))
        run_cells(comparison, further_cells(done, args.seeds, "t999" in comparison.models))
        shutil.rmtree(comparison.output / "states", ignore_errors=True)
    print(write_tables(args.output))


def run_cells(comparison: Comparison, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
    """Runs the cells one after another and says what came out of each."""
    done = {}
    for number, cell in enumerate(cells, 1):
        done[cell] = content = run_cell(comparison, cell)
        metrics, factor = content["metrics"]["wavelet"], content["learning_rate"]["factor"]
        rate = "" if factor is None else f", learning rate x{factor:g}"
        print(
            f"{number}/{len(cells)} {cell.key}: {metrics['psnr_y_to_full_precision']:.2f} dB to full precision, "
            f"{metrics['psnr_y']:.2f} dB{rate}, {content['seconds']:.0f} s",
            flush=True,
        )
    return done


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="tiny-fp", help="full-precision checkpoint: folder, shipped name or Hub id")
    parser.add_argument("--data", help="folder of photographs to calibrate on")
    parser.add_argument("--evaluate", help="folder of other photographs to measure on")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of every method that trains (default: 60)")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3", "w2a2"], metavar="BITS")
    parser.add_argument("--methods", nargs="+", default=list(method_names()), choices=method_names(), metavar="NAME",
                        help=f"of {', '.join(method_names())} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help=f"of the best {REPEATED} methods at each bit width (default: 1)")
    parser.add_argument("--model-t999", metavar="MODEL", help="the model before TRQ, for the main method and the best two others")
    parser.add_argument("--limit", type=int, help="only so many photographs of --evaluate, the first by name")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help=f"further ones, by pyiqa: {', '.join(NAMES)}, .."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of cells and tables")
    parser.add_argument("--table-only", action="store_true", help="only write the tables of what is finished")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message of one line if arguments make no sense."""
    if args.table_only:
        if not read_cells(args.output):
            parser.error(f"{args.output / 'cells'} has no finished cells")
        return
    for name in ("data", "evaluate"):
        if not getattr(args, name):
            parser.error(f"--{name} is needed, a folder of photographs")
    for name, least in (("steps", 1), ("seeds", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}, expected at least {least}")
    for text in args.bits:
        try:
            parse_bits(text)
        except ValueError as error:
            parser.error(f"--bits: {error}")


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        check(parser, args)
        run(args)
    except (StoppedError, KeyboardInterrupt):
        parser.exit(130, "\nstopped; what is finished is kept. Continue with the same command.\n")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
