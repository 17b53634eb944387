"""Carries out a calibration run, from its order to the folder, the record and the report. Prints nothing."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.arguments import Order
from qartsr_pipeline.calibration.data.fingerprint import BEFORE, hardware, versions, without_files
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.family import Family
from qartsr_pipeline.calibration.instances import give_own_weights, gradients_restored
from qartsr_pipeline.calibration.job import (
    MODEL,
    REPORT,
    Job,
    evaluation_files,
    family_of_order,
    forget_unbegun,
    load_job,
    perceptual_of,
)
from qartsr_pipeline.calibration.report.pipeline_folder import model_card, save_pipeline
from qartsr_pipeline.calibration.report.run_report import FinishedRun
from qartsr_pipeline.calibration.run_folder import explained
from qartsr_pipeline.calibration.start.warm_start import RECORD_NAME
from qartsr_pipeline.calibration.training.calibration_state import STATE_NAME, CalibrationContext, StateFile
from qartsr_pipeline.calibration.training.engine import calibrate
from qartsr_pipeline.calibration.training.progress import SILENT, Calibrated, Progress, Stopped
from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from qartsr_pipeline.checkpoint_files import shipped_checkpoints
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.folder_lock import FolderLock
from qartsr_pipeline.quantization.calibrating import calibrating_layers
from qartsr_pipeline.quantization.diffusers_quantizer import attach_quantizer
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.held_weights import release_weights


@dataclass(frozen=True)
class LayerError:
    """How far one quantized layer is from the original, by itself on calibration inputs.

    Attributes:
        name: component and qualified name, such as "unet.conv_in".
        before, after: |y_q - y|^2 / |y|^2 of its output, before and after training.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class QuantizationResult:
    """What `quantize` returns.

    Attributes:
        pipeline: the quantized pipeline, deployed: ready to be called and saved. None if the run was stopped, or if the recipe's
            grid exists in simulation only, for comparison.
        report: the page of the HTML report; None if the run was stopped, or has no folder.
        layers: every quantized layer's error.
        rows: metrics on the evaluation images: bicubic enlargement, full precision, quantized.
        record: what `quantization.json` of the folder says: recipe, data, versions, losses.
        output: the run's folder, None for a temporary one.
        finished: False if the run was stopped; it continues when it is called again with the same arguments.
    """

    pipeline: CheckpointPipeline | None = None
    report: Path | None = None
    layers: list[LayerError] = field(default_factory=list)
    rows: list[EvaluationRow] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    output: Path | None = None
    finished: bool = False


def carry_out(order: Order, progress: Progress = SILENT, workers: Workers = ALONE) -> QuantizationResult:
    """Runs a calibration to its end, or until it is asked to stop.

    Args:
        workers: the processes that were launched together; the first one writes, and has the result.

    Raises:
        ValueError, OSError, ImportError: see `job.load_job`; a full or read-only disk. FloatingPointError: training diverged.
    """
    untouched = nullcontext() if order.model is None else gradients_restored(order.model)
    with FolderLock(order.output) as lock:
        try:
            family = family_of_order(order)
            with evaluation_files(order, family) as evaluation, untouched:
                return _carry_out(order, family, evaluation, progress, workers, lock)
        except Stopped:
            return QuantizationResult(output=order.output if order.keeps_output else None)
        except (OSError, ValueError, ImportError) as error:
            if lock.held and not order.continues:
                forget_unbegun(order.output)
            if isinstance(error, OSError) and (clearer := explained(error, order.output)) is not error:
                raise clearer from error
            raise


def _carry_out(
    order: Order, family: Family, evaluation: list[Path], progress: Progress, workers: Workers, lock: FolderLock
) -> QuantizationResult:
    started = time.perf_counter()
    job = workers.together(lambda: load_job(order, family, evaluation, progress, workers, lock))
    arguments = order.arguments
    perceptual = perceptual_of(arguments, job.perceptual, job.full_precision) if job.perceptual else None
    context = CalibrationContext(
        pipeline=job.pipeline,
        full_precision=job.full_precision,
        recipe=job.recipe,
        bits=job.bits,
        patches=job.patches,
        seed=arguments.seed,
        degradation=arguments.degradation,
        perceptual=perceptual,
        data=without_files(job.data),
        progress=progress,
        workers=workers,
    )
    calibrated = calibrate(context, StateFile(order.output / STATE_NAME), job.start)
    output = order.output if order.keeps_output else None
    if calibrated.stopped or not workers.is_main:
        return QuantizationResult(output=output, finished=not calibrated.stopped)
    record = record_of(job, calibrated, perceptual.name if perceptual else None)
    if job.recipe.layer.deployable:
        _deploy(job, calibrated, record)
    run = FinishedRun(
        model_name=job.name,
        bits=arguments.bits,
        recipe=job.recipe,
        seed=arguments.seed,
        degradation=arguments.degradation,
        data=job.data,
        full_precision=job.full_precision,
        quantized=job.pipeline,
        evaluation=list(job.evaluation),
        calibrated=calibrated,
        record=record,
        seconds=time.perf_counter() - started,
        sweep=job.sweep,
    )
    report = context.family.report(run, order.output / REPORT)
    return QuantizationResult(
        pipeline=_ready(job) if job.recipe.layer.deployable else None,
        report=report.page if output else None,
        layers=[LayerError(name, calibrated.errors_before[name], after) for name, after in calibrated.layer_errors.items()],
        rows=report.rows,
        record=record,
        output=output,
        finished=True,
    )


def _deploy(job: Job, calibrated: Calibrated, record: dict[str, Any]) -> None:
    """Freezes the layers in place, and writes the model's folder."""
    for component, model in family_of(job.pipeline).models(job.pipeline).items():
        if calibrating_layers(model):
            freeze(model, calibrated.schemes[component])
        else:  # a recipe keeps all its layers
            attach_quantizer(model, calibrated.schemes[component])
        release_weights(model)  # of layers that are not quantized
    order = job.order
    record["accounting"] = family_of(job.pipeline).account(job.pipeline).to_dict()
    if order.keeps_output:
        card = model_card(record, job.source or order.output, hub_id_of(order), type(job.pipeline).__name__)
        save_pipeline(job.pipeline, order.output / MODEL, RECORD_NAME, record, card)


def hub_id_of(order: Order) -> str | None:
    """Of the full-precision model, where it comes from the Hub."""
    model = order.arguments.model
    on_disk = order.model is not None or Path(model).expanduser().exists() or model in shipped_checkpoints()
    return None if on_disk else model


def _ready(job: Job) -> CheckpointPipeline:
    """The quantized pipeline, no longer sharing anything with the one that was given."""
    if job.order.model is not None:
        give_own_weights(job.pipeline)
    job.pipeline.set_progress_bar_config()
    return job.pipeline


def record_of(job: Job, calibrated: Calibrated, perceptual: str | None) -> dict[str, Any]:
    """What `quantization.json` says."""
    arguments = job.order.arguments
    return {
        "model": job.name,
        "timestep": job.pipeline.config["timestep"],
        "retrained": job.retrained and {name: value for name, value in job.retrained.items() if name != "data"},
        "bits": arguments.bits,
        "recipe": job.recipe.to_dict(),
        "seed": arguments.seed,
        **({} if arguments.dtype == "float32" else {"dtype": arguments.dtype}),
        "start": calibrated.start,
        "degradation": arguments.degradation,
        "perceptual": perceptual,
        **({"no_lpips": job.no_lpips} if job.no_lpips else {}),
        "data": job.data,
        BEFORE: job.before,
        "versions": versions(),
        "hardware": hardware(job.pipeline.vae.device.type),
        "loss": {stage: [float(f"{loss:.4g}") for loss in losses] for stage, losses in calibrated.losses.items()},
        "modules": calibrated.turns,
        **({"sensitivities": calibrated.sensitivities} if calibrated.sensitivities else {}),
        "relative_error_of_each_layer_alone": {
            "before_training": {name: round(error, 6) for name, error in calibrated.errors_before.items()},
            "after_training": {name: round(error, 6) for name, error in calibrated.layer_errors.items()},
        },
    }
