"""Trains the small full-precision video model: WAN's classes in one step.

    python -m calibration.teacher.video.train --data PHOTOS --clips FRAMES --output runs/video
    python -m calibration.teacher.video.train --resume --output runs/video                after Ctrl-C, or with more --phases

Five phases, each with its own steps and learning rate (`retraining.settings.Phase`; patches are the frames' sides):

1. ``images``: the autoencoder learns to reproduce frames, high-resolution and bicubic ones, each by itself.
2. ``latent``: autoencoder frozen. The transformer learns the step from the latents of the bicubic frames to those of the
   originals, with an error that is about that of their pixels. Without this phase the decoder would do all the work.
3. ``pixel``: transformer and decoder learn together, on decoded frames, each by itself: for the same time a batch shows five
   times as many different images as clips of five frames would.
4. ``whole``: the encoder learns as well, still on frames by themselves. With a learning rate as high as that of ``pixel`` it
   would undo what the others have learned.
5. ``joint``: everything trains on clips and on the differences of their frames, and the decoder's convolutions see the frames
   before.

Latents are normalised before the first phase but ``images``. Everything is a function of the seed and of the step number: a
stopped run continues as if it had not been stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from calibration.teacher.command import run_training
from calibration.teacher.video.clips import MovingClips, VideoData
from calibration.teacher.video.model import TIMESTEP, VideoModel, new_model
from calibration.teacher.video.start import LUMA, SCALES
from qartsr_pipeline.calibration.data.clips import as_clips
from qartsr_pipeline.calibration.data.fingerprint import versions
from qartsr_pipeline.calibration.data.pairs import Pair, sample_pair
from qartsr_pipeline.calibration.retraining.losses import image_quality
from qartsr_pipeline.calibration.retraining.settings import Phase, Settings, parse_phase, phase_text
from qartsr_pipeline.calibration.retraining.trainer import STATE_NAME, Trainer, load_state
from qartsr_pipeline.calibration.training.progress import SILENT, Progress

PHASES = ("images", "latent", "pixel", "whole", "joint")
DEFAULT_PHASES = ("latent:500:1e-3:96:8", "pixel:6000:3e-4:96:8", "whole:1300:1e-4:96:8", "joint:1000:5e-5:96:2")
STILL = ("images", "latent", "pixel", "whole")  # phases that see frames by themselves
DIFFERENCES = 0.5  # weight of the frames' differences in time


@dataclass
class VideoTrainer(Trainer):
    """`Trainer` with clips and the phases of `PHASES`."""

    model: VideoModel  # type: ignore[assignment]
    frames: int = 5

    def _trained_modules(self, phase: Phase) -> list[torch.nn.Module]:
        vae, transformer = self.model.vae, self.model.transformer
        modules: dict[str, list[torch.nn.Module]] = {
            "images": [vae],
            "latent": [transformer],
            "pixel": [transformer, vae.decoder],
            "whole": [transformer, vae],
            "joint": [transformer, vae],
        }
        return modules[phase.name]

    def _new_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        if phase.name != "images" and self.step == 0 and bool((self.model.latents_std == 1).all()):
            self._normalise_latents()
        return super()._new_optimizer(phase)

    @torch.no_grad()
    def _normalise_latents(self) -> None:
        """Makes the latents of training clips have mean 0 and unit variance, channel by channel."""
        self.model.latents_mean.zero_()
        self.model.latents_std.fill_(1)
        rng = np.random.default_rng(self.settings.seed)
        latents = self.model.encode(as_clips(sample_pair(self.data.patches, 16, 128, rng), self.frames)[1].to(self.model.device))
        self.model.latents_mean.copy_(latents.mean((0, 2, 3, 4)))
        self.model.latents_std.copy_(latents.std((0, 2, 3, 4)).clamp_min(1e-3))
        self.average = self._weights()

    def _batch(self, phase: Phase, rng: np.random.Generator) -> Pair:
        patches, frames = self.data.patches, self.frames
        if phase.name in STILL and isinstance(patches, MovingClips):
            patches, frames = patches.of_length(1), 1
        return as_clips(sample_pair(patches, phase.batch, phase.patch, rng), frames)

    def _loss(self, phase: Phase, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        model = self.model
        if phase.name == "images":
            clip = torch.cat([high, up[:1]])
            return frame_loss(model.decode(model.encode(clip), temporal=False), clip)
        if phase.name == "latent":
            with torch.no_grad():
                source, target = model.encode(up), model.encode(high).float()
            weight = (model.latents_std * model.latents_std.new_tensor(SCALES)).view(1, -1, 1, 1, 1)
            return F.l1_loss(model.step(source).float() * weight, target * weight)
        with torch.set_grad_enabled(phase.name != "pixel"):
            source = model.encode(up)
        return frame_loss(model.decode(model.step(source), temporal=phase.name == "joint"), high)

    def _scores(self, phase: Phase) -> dict[str, float]:
        rows = [validate(self.model, up.to(self.model.device), high, phase.name == "joint") for up, high in self.data.held_out]
        return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else {})}


def frame_loss(clip: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 of colours, of luma, and of the colours' differences from frame to frame; clips (B, 3, F, H, W)."""
    error = clip.float() - target
    luma = (error * torch.tensor(LUMA, device=error.device).view(3, 1, 1, 1)).sum(1)
    loss = error.abs().mean() + luma.abs().mean()
    return loss + DIFFERENCES * error.diff(dim=2).abs().mean() if clip.shape[2] > 1 else loss


@torch.no_grad()
def validate(model: VideoModel, up: torch.Tensor, high: torch.Tensor, temporal: bool) -> dict[str, float]:
    """Mean PSNR-Y of the frames in dB, and the error of differences in time ("flicker", in 255ths).

    "bypass" leaves the transformer out; "autoencoder" reproduces the target. ``up`` and ``high`` are (1, 3, F, H, W) in [-1, 1].
    """
    latents = model.encode(up)
    results = {
        "bicubic": up,
        "model": model.decode(model.step(latents), temporal),
        "bypass": model.decode(latents, temporal),
        "autoencoder": model.decode(model.encode(high), temporal),
    }
    scores = {name: _quality(result.cpu(), high) for name, result in results.items()}
    for name in ("bicubic", "model"):
        error = (results[name].cpu().clamp(-1, 1) - high).diff(dim=2)
        scores[f"flicker_{name}"] = float(error.abs().mean()) * 127.5
    return scores


def _quality(clip: torch.Tensor, target: torch.Tensor) -> float:
    return float(np.mean([image_quality(clip[:, :, i], target[:, :, i]) for i in range(clip.shape[2])]))


@dataclass(frozen=True)
class VideoRun:
    """A training run.

    Attributes:
        resume: continue from the state in ``output``.
    """

    data: VideoData
    phases: list[Phase]
    settings: Settings
    output: Path
    timestep: int = TIMESTEP
    resume: bool = False
    device: str = "cpu"

    def trainer(self, progress: Progress = SILENT) -> VideoTrainer:
        """The run at its beginning or, with ``resume``, where it was left.

        Raises:
            ValueError, OSError: bad data, or a state that does not fit.
        """
        clips = self.data.load()
        model = new_model(self.settings.seed, self.timestep).to(self.device)
        self.output.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(self.settings, name) for name in ("seed", "ema", "every", "bf16")}
        record = {
            **clips.record,
            "seed": self.settings.seed,
            "timestep": self.timestep,
            "arguments": {**asdict(self.data), **settings, "timestep": self.timestep},
            "versions": versions(),
        }
        trainer = VideoTrainer(
            model, self.phases, clips, self.settings, self.output, record, progress=progress, frames=self.data.frames
        )
        if self.resume:
            trainer.resume()
        return trainer


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calibration.teacher.video.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of photographs; without it images are procedural")
    parser.add_argument("--clips", help="folder of real clips, each a folder of images")
    parser.add_argument("--frames", type=int, default=5, help="of a training clip")
    parser.add_argument("--output", type=Path, default=Path("runs/video"))
    parser.add_argument("--timestep", type=int, default=TIMESTEP, help=f"T (default: {TIMESTEP})")
    parser.add_argument("--phases", nargs="+", metavar="NAME:STEPS:LR:PATCH:BATCH", help=f"default: {' '.join(DEFAULT_PHASES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the moving average of the weights")
    parser.add_argument("--every", type=int, default=250, metavar="N", help="steps between validations, each of which is saved")
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="photographs kept for validation")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output, with its arguments unless given anew"
    )
    return parser


def parse(argv: list[str] | None) -> VideoRun:
    """The run that the arguments describe; with ``--resume`` they default to those of the run itself.

    Raises:
        ValueError, OSError: an argument is out of range, or there is a state and no ``--resume``, or the other way round.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    path = args.output / STATE_NAME
    if args.resume:
        state = load_state(path)
        parser.set_defaults(**(state.get("record") or {}).get("arguments", {}))
        parser.set_defaults(phases=[phase_text(Phase(**phase)) for phase in state["phases"]])
        args = parser.parse_args(argv)
    elif path.exists():
        raise ValueError(f"{path} is there already: continue that run with --resume, or choose another --output")
    if args.frames < 1 or args.every < 1 or args.held_out < 0 or not 0 <= args.ema < 1 or not 0 < args.timestep < 1000:
        raise ValueError("--frames and --every must be above 0, --ema at least 0 and below 1, --timestep from 1 to 999")
    return VideoRun(
        data=VideoData(args.data, args.clips, args.frames, args.held_out),
        phases=[parse_phase(text, PHASES) for text in args.phases or DEFAULT_PHASES],
        settings=Settings(seed=args.seed, ema=args.ema, every=args.every, bf16=args.bf16),
        output=args.output,
        timestep=args.timestep,
        resume=args.resume,
        device=args.device,
    )


def main(argv: list[str] | None = None) -> None:
    run_training(arguments(), lambda progress: parse(argv).trainer(progress), "calibration.teacher.video.export")


if __name__ == "__main__":
    main()
