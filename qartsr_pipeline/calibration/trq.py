"""TRQ, QArtSR's first stage (timestep retraining quantization, arXiv 2503.05584): finds the timestep T at which a one-step model
bears quantization best, and retrains the model there.

    z_H = (z_L - sqrt(1 - abar) eps) / sqrt(abar)         the one step; abar is that of T, eps the UNet's output

An error of eps reaches z_H times the amplification sqrt(1 - abar) / sqrt(abar): 14.6 at T = 999 of Stable Diffusion's schedule,
next to nothing near T = 0. So every candidate T is retrained for the same few steps, from the same model moved there
(`move_timestep`), and measured on held-out images: its full-precision quality, what bypassing the UNet costs, and the relative
error of z_H under plain quantization of the UNet.

The rule that picks T (our reading; the paper states none):

1. Candidates at which bypassing the UNet costs less than 1 dB are refused: where the UNet does nothing, it has no quantization
   error and no use.
2. Of the rest, those within 0.1 dB of the best one's full-precision quality stay.
3. Of these, the one with the least relative error of z_H is taken.

The chosen candidate is then trained on for the full number of steps. Retraining is by the L1 distance of latents, then of images;
`TRQ.perceptual` adds features. The paper's is L2 with LPIPS (the commands' `l2+lpips`), and OSEDiff's variational distillation,
which is not here.

The output folder holds ``sweep.json``, ``sweep.md``, ``sweep.png`` (where matplotlib is installed), one folder for each
candidate, and ``model``: the full-precision pipeline folder. Every finished candidate is kept: a second call with the same
arguments continues where the first was stopped.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qartsr_pipeline.calibration.data.fingerprint import versions, without_files
from qartsr_pipeline.calibration.data.pairs import TrainingSet
from qartsr_pipeline.calibration.report.pipeline_folder import TRAINING_RECORD, check_target, save_pipeline
from qartsr_pipeline.calibration.retraining.losses import image_quality, validate
from qartsr_pipeline.calibration.retraining.move_timestep import check_patches, latents_for_fit, move_timestep
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel, add_adapters, is_large, merge_adapters
from qartsr_pipeline.calibration.retraining.report import write_sweep
from qartsr_pipeline.calibration.retraining.settings import Phase, Rule, Settings, TimestepSearch, check_made_with
from qartsr_pipeline.calibration.retraining.trainer import STATE_NAME, Trainer
from qartsr_pipeline.calibration.run_folder import remove_left_over
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress, Stopped
from qartsr_pipeline.folder_lock import FolderLock
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers
from qartsr_pipeline.whole_files import make_folder, write_whole

ENDS = ("conv_in", "conv_out")  # of the UNet, kept at 8 bits
RESULT_NAME = "result.json"
CALIBRATION_PATCHES = 16  # the quantizer's input bounds are taken from their latents


@dataclass(frozen=True)
class Candidate:
    """One timestep, measured after its short retraining. PSNR-Y in dB, means over the held-out images.

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
    """How many times larger an error of eps is in z_H."""
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
            " little. Give phases with more steps, other timesteps, or a lower least bypass cost"
        )
    best = max(candidate.full_precision for candidate in working)
    good = [candidate for candidate in working if candidate.full_precision >= best - rule.quality_margin]
    return min(good, key=lambda candidate: candidate.z_error)


@dataclass
class TRQ:
    """Retrains and measures the candidates, picks one and retrains it in full.

    Attributes:
        model: full-precision pipeline folder, shipped name or Hub id.
        output: folder of everything that is made.
        settings: of every training run. Where adapters are trained, the encoder trains as well, as OSEDiff's.
        perceptual: see `losses.PhaseLoss`.
        progress: called after every step of a training run with the steps of that run; see `Progress`.
    """

    model: str
    data: TrainingSet
    output: Path
    search: TimestepSearch = TimestepSearch()
    settings: Settings = Settings(every=250)
    perceptual: Perceptual | None = None
    device: str | torch.device = "cpu"
    progress: Progress = SILENT

    def run(self) -> Path:
        """The whole stage; returns the full-precision pipeline folder at the chosen timestep.

        Raises:
            ValueError: see `choose`, `sweep` and `check_patches`. Stopped: call it again to continue.
        """
        check_target(self.output / "model")
        check_patches(self.data.patches, (*self.search.phases, *self.search.full_phases))
        _, chosen = self.sweep()
        start = self.output / f"t{chosen.timestep:03d}" / "model"
        return self.retrain(str(start), chosen.timestep, self.search.full_phases, self.output)

    def sweep(self) -> tuple[list[Candidate], Candidate]:
        """Every candidate and the chosen one; writes the table, its data and the plot.

        Raises:
            ValueError: a candidate's folder was made with other settings; see also `choose`. Stopped: call it again to continue.
        """
        candidates = [self.candidate(timestep) for timestep in self.search.timesteps]
        self.write(candidates, None)  # the measurements are there also when the rule refuses them all
        chosen = choose(candidates, self.search.rule)
        self.write(candidates, chosen)
        return candidates, chosen

    def candidate(self, timestep: int) -> Candidate:
        """One timestep's result, from its folder where it is finished."""
        folder = self.output / f"t{timestep:03d}"
        path = folder / RESULT_NAME
        made_with = self._made_with()
        if path.is_file():
            result = _read_record(path, folder)
            if result.get("made_with") != made_with:
                raise ValueError(f"{path} was made with other settings or data: choose another output folder, or remove {folder}")
            before = result.get("start_sha256")  # absent in older folders
            if before is not None and before != self._digest:
                raise ValueError(f"{path} was made from another model: choose another output folder, or remove {folder}")
            return Candidate(**result["candidate"])
        pipeline_folder = self.retrain(self.model, timestep, self.search.phases, folder)
        candidate = self.measure(OneStepModel.from_pretrained(pipeline_folder).to(self.device))
        start = _read_record(pipeline_folder / TRAINING_RECORD, pipeline_folder).get("start_sha256")
        result = {"candidate": asdict(candidate), "made_with": made_with, "start_sha256": start}
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
        return candidate

    def retrain(self, start: str, timestep: int, phases: tuple[Phase, ...], folder: Path) -> Path:
        """As `_retrain`, as the only process that works in the folder.

        Raises:
            FolderInUseError: another one does. See `_retrain` for the others.
        """
        make_folder(folder)
        with FolderLock(folder).take():
            remove_left_over(folder)
            return self._retrain(start, timestep, phases, folder)

    def _retrain(self, start: str, timestep: int, phases: tuple[Phase, ...], folder: Path) -> Path:
        """Trains ``start`` at ``timestep`` in ``folder`` and returns the pipeline folder ``folder / "model"``.

        The training state is removed once that folder is written; a folder that is already there, made from the same model with
        the same settings and data, is returned as it is.

        Raises:
            ValueError: the model or the state in ``folder`` was made with others.
            Stopped: the state is saved; call it again to continue. FloatingPointError: the loss became NaN or infinite.
        """
        target, state_path = folder / "model", folder / STATE_NAME
        model = OneStepModel.from_pretrained(start)
        adapters = is_large(model) if self.settings.adapters is None else self.settings.adapters
        record = self._record(start, model.digest(), timestep, phases, adapters)
        if target.exists() and not state_path.exists():
            check_made_with(target, _read_record(target / TRAINING_RECORD, target), record)
            return target
        move_timestep(model, timestep, latents_for_fit(model, self.data.patches, self.settings.degradation))
        if adapters:
            add_adapters(model, seed=self.settings.seed)
        trainer = self._trainer(model, phases, folder, record)
        if state_path.exists():
            trainer.resume()
        if not trainer.run():
            raise Stopped(f"stopped at {trainer.place} of timestep {timestep}; call it again to continue")
        if adapters:
            merge_adapters(model)
        save_pipeline(model.cpu().to_pipeline(), target, TRAINING_RECORD, record | {"validation": trainer.history[-1]})
        state_path.unlink()
        return target

    def _trainer(self, model: OneStepModel, phases: tuple[Phase, ...], folder: Path, record: dict[str, Any]) -> Trainer:
        """Its ``record`` goes into the state."""
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        settings = replace(self.settings, train_encoder=self.settings.train_encoder or record["adapters"])
        return _SameRun(model, list(phases), self.data, settings, folder, record, self.perceptual, self.progress)

    @cached_property
    def _digest(self) -> str:
        """Of the model that the candidates are retrained from."""
        return OneStepModel.from_pretrained(self.model).digest()

    @torch.no_grad()
    def measure(self, model: OneStepModel) -> Candidate:
        """Measures a model at its timestep as `Candidate` says."""
        quality = validate(model, self.data.held_out)
        latents = latents_for_fit(model, self.data.patches, self.settings.degradation, CALIBRATION_PATCHES)
        quantized = plainly_quantized(model, latents, self.search.bits)
        factor = amplification(model.alpha_bar)
        errors, scores = [], []
        for up, high in self.data.held_out:
            z = model.encode(up.to(self.device))
            exact, rounded = model.step(z), quantized.step(z)  # z_H
            full_precision, image = model.decode(exact), model.decode(rounded)
            difference = (rounded - exact).norm()
            eps = (z - math.sqrt(model.alpha_bar) * exact) / math.sqrt(1 - model.alpha_bar)
            errors.append((difference / factor / eps.norm(), difference / exact.norm()))
            scores.append((image_quality(image, high), image_quality(image, full_precision)))
        eps_error, z_error = torch.tensor(errors).mean(0).tolist()
        to_original, to_full_precision = torch.tensor(scores).mean(0).tolist()
        return Candidate(
            timestep=model.timestep,
            amplification=factor,
            full_precision=quality["model"],
            bypass=quality["bypass"],
            bicubic=quality["bicubic"],
            quantized=to_original,
            quantized_to_full_precision=to_full_precision,
            eps_error=eps_error,
            z_error=z_error,
        )

    def _options(self) -> dict[str, Any]:
        """What the results depend on, beside model and images, as JSON knows it."""
        search, settings = asdict(self.search), asdict(self.settings)
        options = {name: search[name] for name in ("timesteps", "phases", "full_phases", "bits", "rule")}
        options |= {name: value for name, value in settings.items() if name != "ema"}
        if self.perceptual is not None:
            options["perceptual"] = self.perceptual.name
        return json.loads(json.dumps(options))

    def _made_with(self) -> dict[str, Any]:
        """What a candidate's result depends on, as JSON knows it."""
        independent = ("timesteps", "full_phases", "rule", "every")
        options = {name: value for name, value in self._options().items() if name not in independent}
        return {"model": Path(self.model).name, "data": self._data(), **options}

    def _data(self) -> dict[str, Any] | None:
        """Number and hash of the images; the list of photographs stands in the records of the models."""
        data = self.data.record.get("data")
        return data and without_files(data)

    def _record(self, start: str, digest: str, timestep: int, phases: tuple[Phase, ...], adapters: bool) -> dict[str, Any]:
        """The beginning of training.json."""
        return {
            "start": Path(start).name,
            "start_sha256": digest,
            "timestep": timestep,
            "phases": [asdict(phase) for phase in phases],
            "adapters": adapters,
            "perceptual": self.perceptual.name if self.perceptual else None,
            "options": self._options(),
            **self.data.record,
            "versions": versions(),
        }

    def write(self, candidates: list[Candidate], chosen: Candidate | None) -> None:
        """Writes table, its data and the plot."""
        sweep = {
            "model": Path(self.model).name,
            "chosen": chosen and chosen.timestep,
            "rows": [asdict(candidate) | {"bypass_cost": candidate.bypass_cost} for candidate in candidates],
            "options": self._options(),
            "pictures_held_out": len(self.data.held_out),
            "data": self._data(),
            "versions": versions(),
        }
        write_sweep(sweep, self.output)


class _SameRun(Trainer):
    """Continues from no state but that of a run of the same model, data and settings."""

    def _check(self, state: dict[str, Any]) -> None:
        super()._check(state)
        check_made_with(self.state_path, (state.get("record") or {}) | {"phases": state["phases"]}, self.record)


def _read_record(path: Path, folder: Path) -> dict[str, Any]:
    """What was recorded of a retrained model; ValueError that says to remove ``folder`` where it is missing or damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict):
            return record
        why = f"{type(record).__name__} in the place of an object"
    except (OSError, ValueError) as error:
        why = str(error)
    raise ValueError(f"{path}, which says how the model there was made, cannot be read ({why}): remove {folder} to retrain anew")


def plainly_quantized(model: OneStepModel, latents: list[torch.Tensor], bits: tuple[int, int]) -> OneStepModel:
    """A copy whose UNet is quantized by minimum and maximum alone: no smoothing, no low-rank branch, nothing trained.

    Args:
        latents: z_L; the input bounds are taken from them.
        bits: of weights and activations; the UNet's first and last layer keep at least 8.
    """
    model = copy.deepcopy(model)
    folding = fold(model.unet, model.timestep, model.prompt_embeds)
    ends: dict[str, LayerScheme | None] = dict.fromkeys(ENDS, LayerScheme(max(8, bits[0]), max(8, bits[1])))
    scheme = QuantizationScheme(LayerScheme(*bits), ends, folding)
    layers: dict[str, torch.nn.Module] = {name: layer for name, (layer, _) in quantizable_layers(model.unet, scheme).items()}
    samples = observe(layers, model.step, latents)
    prepare(model.unet, scheme)
    initialise(calibrating_layers(model.unet), samples, Initialisation(bounds="minmax", smoothing=(None,)))
    return model
