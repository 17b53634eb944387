"""QArtSR's first stage, TRQ (arXiv 2503.05584): finds the timestep at which a one-step model bears quantization best.

    python calibration/trq.py MODEL --timesteps 20 100 250 500 999 --data PHOTOS --output runs/trq

An error of eps reaches z_H = (z_L - sqrt(1 - abar) eps) / sqrt(abar) times the amplification sqrt(1 - abar) / sqrt(abar): 14.6
at T = 999 of Stable Diffusion's schedule, next to nothing near T = 0. So every candidate is retrained for the same few steps,
starting from MODEL moved there (`teacher_start.move_timestep`), and measured on held-out pictures: its full-precision quality,
what bypassing the UNet costs, and the relative error of z_H under plain quantization of the UNet.

The rule that picks T (our reading; the paper states none):

1. Candidates at which bypassing the UNet costs less than 1 dB are refused: where the UNet does nothing, it has no quantization
   error and no use.
2. Of the others, those within 0.1 dB of the best one's full-precision quality stay.
3. Of these, the one with the least relative error of z_H is taken.

Retraining is by the L1 distance of latents, then of pictures; `Search.perceptual` adds features. The paper's is L2 with LPIPS,
and OSEDiff's variational score distillation, which is not here.

The chosen candidate is then trained on for the full number of steps. The output folder holds ``sweep.json``, ``sweep.md``,
``sweep.png`` (where matplotlib is installed), one folder for each candidate, and ``model``: the full-precision pipeline folder.
Every finished candidate is kept: a second call with the same arguments goes on where the first was stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from calibration.teacher.export import RECORD_NAME, pipeline_of
from calibration.teacher.train import pictures
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import versions
from qartsr_pipeline.calibration.data.overlap import without_files
from qartsr_pipeline.calibration.data.pairs import Pair, Patches
from qartsr_pipeline.calibration.recipe import parse_bits
from qartsr_pipeline.calibration.report.pipeline_folder import check_target, save_pipeline
from qartsr_pipeline.calibration.retraining.adapters import add_adapters, is_large, merge_adapters
from qartsr_pipeline.calibration.retraining.losses import DISTANCES, Perceptual, picture_quality, validate
from qartsr_pipeline.calibration.retraining.one_step_model import Teacher
from qartsr_pipeline.calibration.retraining.plots import plot_sweep
from qartsr_pipeline.calibration.retraining.settings import Phase, Settings, parse_phase
from qartsr_pipeline.calibration.retraining.start import latents_for_fit, move_timestep, teacher_from_folder
from qartsr_pipeline.calibration.retraining.trainer import Trainer
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.calibration.training.training_state import write_whole
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers

TIMESTEPS = (20, 100, 250, 500, 999)
SHORT = ("latent:100:1e-4:96:8", "pixel:200:1e-4:96:8")  # larger rates lose more in so few steps than they win
FULL = ("latent:1000:2e-4:96:8", "pixel:3000:2e-4:96:8")
ENDS = ("conv_in", "conv_out")  # of the UNet, kept at 8 bits
RESULT_NAME = "result.json"
CALIBRATION_PATCHES = 16  # whose latents the quantizer's input bounds are taken from


class Stopped(Exception):
    """Somebody asked to stop; everything up to here is saved."""


@dataclass(frozen=True)
class Rule:
    """The limits of the rule at the head of this file, in dB of PSNR-Y."""

    least_bypass_cost: float = 1.0
    quality_margin: float = 0.1


@dataclass(frozen=True)
class Options:
    """What a search for the timestep is a function of, beside model and pictures.

    Attributes:
        phases, full_phases: of the short retraining at each candidate, and of the one at the chosen timestep.
        bits: of weights and activations under plain quantization.
        adapters: train low-rank adapters on UNet and VAE encoder instead of all UNet weights; None for models above
            `teacher_adapters.LARGE` only.
        train_encoder, loss, degradation, seed, every, bf16: see `training_settings.Settings`.
    """

    timesteps: tuple[int, ...] = TIMESTEPS
    phases: tuple[Phase, ...] = tuple(map(parse_phase, SHORT))
    full_phases: tuple[Phase, ...] = tuple(map(parse_phase, FULL))
    bits: tuple[int, int] = (4, 4)
    rule: Rule = field(default_factory=Rule)
    adapters: bool | None = None
    train_encoder: bool = False
    loss: str = "l1"
    degradation: str = "bicubic"
    seed: int = 0
    every: int = 250
    bf16: bool = True

    def __post_init__(self) -> None:
        if not self.timesteps or len(set(self.timesteps)) < len(self.timesteps) or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps {list(self.timesteps)}: expected different whole numbers from 0 to 999")

    def settings(self, output: Path, adapters: bool) -> Settings:
        """Those of a training run in the folder `output`. Adapters train in the encoder as well, as OSEDiff's."""
        shared = {part.name: getattr(self, part.name) for part in fields(Settings) if hasattr(self, part.name)}
        return Settings(output, **shared | {"train_encoder": self.train_encoder or adapters})

    @property
    def of_candidates(self) -> dict[str, Any]:
        """What a candidate's result depends on, as JSON knows it."""
        kept = {name: value for name, value in asdict(self).items() if name not in ("timesteps", "full_phases", "rule", "every")}
        return json.loads(json.dumps(kept))


@dataclass(frozen=True)
class Candidate:
    """One timestep, measured after its short retraining. PSNR-Y in dB, means over the held-out pictures.

    Attributes:
        amplification: sqrt(1 - abar) / sqrt(abar).
        full_precision, bypass: quality of the model, and of the model with its UNet left out (z_H = z_L).
        bicubic: of the input.
        quantized, quantized_to_full_precision: after plain quantization of the UNet; to the original, to the unquantized output.
        eps_error, z_error: relative error of eps and of z_H under it, |q - fp| / |fp|.
    """

    timestep: int
    amplification: float
    full_precision: float
    bypass: float
    bicubic: float
    quantized: float
    quantized_to_full_precision: float
    eps_error: float
    z_error: float

    @property
    def bypass_cost(self) -> float:
        """What leaving the UNet out costs, in dB."""
        return self.full_precision - self.bypass


def amplification(alpha_bar: float) -> float:
    """By how much an error of eps is larger in z_H."""
    return math.sqrt(1 - alpha_bar) / math.sqrt(alpha_bar)


def choose(candidates: list[Candidate], rule: Rule) -> Candidate:
    """The candidate that the rule at the head of this file picks.

    Raises:
        ValueError: bypassing the UNet costs too little at every candidate.
    """
    working = [candidate for candidate in candidates if candidate.bypass_cost >= rule.least_bypass_cost]
    if not working:
        costs = ", ".join(f"{candidate.bypass_cost:.2f} dB at {candidate.timestep}" for candidate in candidates)
        raise ValueError(
            f"at no timestep does bypassing the UNet cost {rule.least_bypass_cost:g} dB ({costs}): the UNet has learned too"
            " little. Give --phases with more steps, other --timesteps, or a lower --least-bypass-cost"
        )
    best = max(candidate.full_precision for candidate in working)
    good = [candidate for candidate in working if candidate.full_precision >= best - rule.quality_margin]
    return min(good, key=lambda candidate: candidate.z_error)


@dataclass
class Search:
    """Retrains and measures the candidates, picks one and retrains it in full.

    Attributes:
        model: full-precision pipeline folder, shipped name or Hub id.
        held_out: pairs that nothing is trained on.
        record: what the pipeline folders shall say about the data; see `calibration/teacher/export.py`.
        perceptual: see `teacher_losses.loss_of`.
    """

    model: str
    patches: Patches
    held_out: list[Pair]
    options: Options
    output: Path
    record: dict[str, Any] = field(default_factory=dict)
    perceptual: Perceptual | None = None
    device: str = "cpu"

    def run(self) -> Path:
        """The whole stage; returns the full-precision pipeline folder at the chosen timestep.

        Raises:
            ValueError: see `choose` and `sweep`. Stopped: call it again to go on.
        """
        check_target(self.output / "model")
        _, chosen = self.sweep()
        start = self.output / f"t{chosen.timestep:03d}" / "model"
        return self.retrain(str(start), chosen.timestep, self.options.full_phases, self.output)

    def sweep(self) -> tuple[list[Candidate], Candidate]:
        """Every candidate and the chosen one; writes the table, its data and the plot.

        Raises:
            ValueError: a candidate's folder was made with other settings; see also `choose`. Stopped: call it again to go on.
        """
        candidates = [self.candidate(timestep) for timestep in self.options.timesteps]
        self._write(candidates, None)  # what was measured is there also when the rule refuses them all
        chosen = choose(candidates, self.options.rule)
        self._write(candidates, chosen)
        return candidates, chosen

    def candidate(self, timestep: int) -> Candidate:
        """One timestep's result, from its folder where it is finished."""
        folder = self.output / f"t{timestep:03d}"
        path = folder / RESULT_NAME
        made_with = {"model": Path(self.model).name, "data": self._pictures, **self.options.of_candidates}
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["made_with"] != made_with:
                raise ValueError(f"{path} was made with other settings or data: choose another --output, or remove {folder}")
            return Candidate(**result["candidate"])
        pipeline_folder = self.retrain(self.model, timestep, self.options.phases, folder)
        candidate = self.measure(teacher_from_folder(pipeline_folder).to(self.device))
        result = {"candidate": asdict(candidate), "made_with": made_with}
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
        return candidate

    @property
    def _pictures(self) -> dict[str, Any] | None:
        """The photographs' number and hash; their list stands in the records of the models."""
        data = self.record.get("data")
        return data and without_files(data)

    def retrain(self, start: str, timestep: int, phases: tuple[Phase, ...], folder: Path) -> Path:
        """Trains ``start`` at ``timestep`` in ``folder`` and returns the pipeline folder ``folder / "model"``.

        The training state is removed once that folder is written, and a folder that is there is taken as it is.
        """
        target = folder / "model"
        folder.mkdir(parents=True, exist_ok=True)
        trainer, adapters = self._trainer(start, timestep, phases, folder)
        if target.exists() and not trainer.state_path.exists():
            return target
        if trainer.state_path.exists():
            trainer.resume()
        if not trainer.run():
            raise Stopped(f"stopped at {trainer.place} of timestep {timestep}; call it again to go on")
        if adapters:
            merge_adapters(trainer.model)
        options = json.loads(json.dumps(asdict(self.options)))
        trained = {
            "start": Path(start).name,
            "timestep": timestep,
            "phases": [asdict(phase) for phase in phases],
            "adapters": adapters,
            "perceptual": getattr(self.perceptual, "name", self.perceptual and "given by the caller"),
        }
        record = {**trained, "options": options, **self.record, "versions": versions(), "validation": trainer.history[-1]}
        save_pipeline(pipeline_of(trainer.model.cpu()), target, RECORD_NAME, record)
        trainer.state_path.unlink()
        return target

    def _trainer(self, start: str, timestep: int, phases: tuple[Phase, ...], folder: Path) -> tuple[Trainer, bool]:
        model = teacher_from_folder(start)
        move_timestep(model, timestep, latents_for_fit(model, self.patches, self.options.degradation))
        adapters = is_large(model) if self.options.adapters is None else self.options.adapters
        if adapters:
            add_adapters(model, seed=self.options.seed)
        model = model.to(device=self.device, memory_format=torch.channels_last)
        settings = self.options.settings(folder, adapters)
        trainer = Trainer(model, list(phases), self.patches, self.held_out, settings, {}, self.perceptual)
        return trainer, adapters

    @torch.no_grad()
    def measure(self, model: Teacher) -> Candidate:
        """Measures a model at its timestep as `Candidate` says."""
        quality = validate(model, self.held_out)
        calibration = latents_for_fit(model, self.patches, self.options.degradation, CALIBRATION_PATCHES)
        quantized = plainly_quantized(model, calibration, self.options.bits)
        errors, scores = [], []
        for up, high in self.held_out:
            z = model.encode(up.to(self.device))
            exact, rounded = model.step(z), quantized.step(z)
            wanted, made = model.decode(exact), model.decode(rounded)
            difference = (rounded - exact).norm()
            eps = (z - math.sqrt(model.alpha_bar) * exact) / math.sqrt(1 - model.alpha_bar)
            errors.append((difference / amplification(model.alpha_bar) / eps.norm(), difference / exact.norm()))
            scores.append((picture_quality(made, high), picture_quality(made, wanted)))
        eps_error, z_error = torch.tensor(errors).mean(0).tolist()
        to_original, to_full_precision = torch.tensor(scores).mean(0).tolist()
        return Candidate(
            timestep=model.timestep,
            amplification=amplification(model.alpha_bar),
            full_precision=quality["model"],
            bypass=quality["bypass"],
            bicubic=quality["bicubic"],
            quantized=to_original,
            quantized_to_full_precision=to_full_precision,
            eps_error=eps_error,
            z_error=z_error,
        )

    def _write(self, candidates: list[Candidate], chosen: Candidate | None) -> None:
        rows = [asdict(candidate) | {"bypass_cost": candidate.bypass_cost} for candidate in candidates]
        options = json.loads(json.dumps(asdict(self.options)))
        report = {
            "model": Path(self.model).name,
            "chosen": chosen and chosen.timestep,
            "rows": rows,
            "options": options,
            "pictures_held_out": len(self.held_out),
            "data": self._pictures,
            "versions": versions(),
        }
        write_whole(self.output / "sweep.json", (json.dumps(report, indent=1) + "\n").encode())
        write_whole(self.output / "sweep.md", markdown(candidates, chosen, self.options).encode())
        try:
            plot_sweep(rows, report["chosen"], self.output / "sweep.png")
        except ImportError:
            pass  # matplotlib is optional; the table says the same


def plainly_quantized(model: Teacher, latents: list[torch.Tensor], bits: tuple[int, int]) -> Teacher:
    """A copy whose UNet is quantized with nothing but minimum and maximum: no smoothing, no branch, nothing trained.

    Args:
        latents: z_L that the input bounds are taken from.
        bits: of weights and activations; the UNet's first and last layer keep at least 8.
    """
    model = copy.deepcopy(model)
    folding = fold(model.unet, model.timestep, model.prompt_embeds)
    ends = dict.fromkeys(ENDS, LayerScheme(*(max(8, number) for number in bits)))
    scheme = QuantizationScheme(LayerScheme(*bits), ends, folding)
    layers = {name: layer for name, (layer, _) in quantizable_layers(model.unet, scheme).items()}
    samples = observe(layers, model.step, latents)
    prepare(model.unet, scheme)
    initialise(calibrating_layers(model.unet), samples, Initialisation(bounds="minmax", smoothing=(None,)))
    return model


def markdown(candidates: list[Candidate], chosen: Candidate | None, options: Options) -> str:
    """The table with the rule below it."""
    bits = "W{}A{}".format(*options.bits)
    lines = [
        "| T | amplification | full precision, dB | UNet bypassed, dB | bypass costs, dB |"
        f" eps error, {bits} | z_H error, {bits} | {bits}, dB | {bits} to full precision, dB | chosen |",
        "| --: " * 9 + "| :-: |",
    ]
    for row in candidates:
        lines.append(
            f"| {row.timestep} | {row.amplification:.3f} | {row.full_precision:.2f} | {row.bypass:.2f} | {row.bypass_cost:.2f}"
            f" | {row.eps_error:.3f} | {row.z_error:.3f} | {row.quantized:.2f} | {row.quantized_to_full_precision:.2f}"
            f" | {'yes' if row is chosen else ''} |"
        )
    steps = " + ".join(f"{phase.steps} {phase.name}" for phase in options.phases)
    lines += [
        "",
        f"PSNR-Y of held-out pictures after {steps} steps at each timestep; bicubic {candidates[0].bicubic:.2f} dB. {bits}: the"
        " UNet quantized plainly (extremes, nothing trained).",
        "",
        f"Rule: bypassing the UNet costs at least {options.rule.least_bypass_cost:g} dB; full precision within"
        f" {options.rule.quality_margin:g} dB of the best of these; then the least error of z_H.",
        "" if chosen else "\nNo candidate passes it.\n",
    ]
    return "\n".join(lines)


def add_search_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Arguments of the search that `calibration/run.py` has, too."""
    steps = {"nargs": "+", "metavar": "NAME:STEPS:LR:PATCH:BATCH"}
    parser.add_argument("--timesteps", type=int, nargs="+", default=list(TIMESTEPS), metavar="T", help="candidates")
    parser.add_argument("--phases", default=list(SHORT), help=f"at each candidate (default: {' '.join(SHORT)})", **steps)
    parser.add_argument("--full-phases", default=list(FULL), help=f"at the chosen one (default: {' '.join(FULL)})", **steps)
    parser.add_argument(
        "--least-bypass-cost", type=float, default=Rule.least_bypass_cost, metavar="DB",
        help="what leaving the UNet out must cost at a timestep that may be chosen (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quality-margin", type=float, default=Rule.quality_margin, metavar="DB",
        help="so much below the best full-precision quality is as good (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="pictures kept for measuring (default: %(default)s)")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="full-precision pipeline folder, shipped name or Hub id")
    add_search_arguments(parser)
    parser.add_argument("--data", help="folder of photographs; without it, procedural pictures are used")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; its `model` is the result")
    parser.add_argument("--sweep-only", action="store_true", help="do not train on at the chosen timestep")
    parser.add_argument("--bits", default="w4a4", help="of the plain quantization (default: w4a4)")
    parser.add_argument(
        "--train", choices=("auto", "all", "adapters"), default="auto", help="UNet weights (default: adapters for large models)"
    )
    parser.add_argument("--train-encoder", action="store_true", help="train the VAE encoder in the pixel phase, as OSEDiff does")
    parser.add_argument("--loss", choices=tuple(DISTANCES), default="l1")
    parser.add_argument("--degradation", choices=tuple(DEGRADATIONS), default="bicubic")
    parser.add_argument("--every", type=int, default=250, help="validate and save every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def options_of(args: argparse.Namespace) -> Options:
    """The options that the arguments describe; raises ValueError that says what is wrong with them."""
    if args.held_out < 1 or args.every < 1:
        raise ValueError("--held-out and --every must be above 0")
    same = {name: getattr(args, name) for name in ("train_encoder", "loss", "degradation", "seed", "every", "bf16")}
    return Options(
        timesteps=tuple(args.timesteps),
        phases=tuple(map(parse_phase, args.phases)),
        full_phases=tuple(map(parse_phase, args.full_phases)),
        bits=parse_bits(args.bits),
        rule=Rule(args.least_bypass_cost, args.quality_margin),
        adapters={"auto": None, "all": False, "adapters": True}[args.train],
        **same,
    )


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        options = options_of(args)
        args.procedural = 0.0 if args.data else 1.0
        patches, held_out, record = pictures(args)
        args.output.mkdir(parents=True, exist_ok=True)
        search = Search(args.model, patches, held_out, options, args.output, record, device=args.device)
        if args.sweep_only:
            search.sweep()
            written = args.output / "sweep.md"
        else:
            written = search.run()
    except Stopped as stopped:
        parser.exit(130, f"\n{stopped}\n")
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))
    print((args.output / "sweep.md").read_text(encoding="utf-8"))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
