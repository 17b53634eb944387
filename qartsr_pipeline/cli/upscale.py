"""`qartsr upscale`: image files or clips in, enlarged ones out. One that fails does not stop the others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, fetch, shipped_checkpoints
from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS, named_class, read_model_index
from qartsr_pipeline.cli.arguments import add_debug, add_device_and_dtype, add_model_option
from qartsr_pipeline.cli.clips import ClipOptions, are_clips, plan_clips
from qartsr_pipeline.cli.jobs import FORMATS, OutputOptions, plan_jobs, sort_out
from qartsr_pipeline.cli.messages import Counts, UsageError, say
from qartsr_pipeline.cli.processes import join_processes
from qartsr_pipeline.image_files import DEFAULT_QUALITY
from qartsr_pipeline.video_files import CODECS, import_av


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("upscale", description="Enlarges images and clips.")
    parser.add_argument(
        "inputs", nargs="+", metavar="IN", help="image files, folders of them, patterns such as '*.png', and clips"
    )
    parser.add_argument("-r", "--recursive", action="store_true", help="search the folders within folders, too")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file, or folder for several images; default: photo_x4.png beside photo.jpg. A file's suffix chooses its format",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of results that get their name here; same: the input's; default: png (lossless)"
    )
    parser.add_argument("--quality", type=_quality, metavar="N", help=f"of JPEG and WebP, 1 to 100; default: {DEFAULT_QUALITY}")
    add_model_option(parser)
    parser.set_defaults(model=None)  # it depends on what is enlarged
    parser.add_argument("--upscale", type=float, default=4.0, metavar="FACTOR", help="above 0 and up to 16; default: 4")
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels of the enlarged image; default: by free memory")
    parser.add_argument("--tile-overlap", type=int, metavar="N", help="default: a quarter of the tile, at most 128")
    parser.add_argument("--color-fix", choices=("wavelet", "adain", "none"), help="default: wavelet; of video models adain")
    parser.add_argument(
        "--fidelity", type=float, default=0.0, metavar="SHARE", help="of the resampled input in the result, 0 to 1; default: 0"
    )
    parser.add_argument(
        "--keep-hidden-colors",
        action="store_true",
        help="enlarge colours under transparency as they are, for textures; default: they become those of visible neighbours",
    )
    add_device_and_dtype(parser)
    clips = parser.add_argument_group("clips", "video files, GIF, and numbered images such as frames/%05d.png")
    clips.add_argument("--codec", choices=tuple(CODECS), help="default: h264 for 8 bits, hevc for more; av1 in .webm")
    clips.add_argument("--crf", type=int, metavar="N", help="quality, 0 is best; default: 18 for h264, 20 for hevc, 24 for av1")
    clips.add_argument("--fps", type=float, metavar="N", help="frames a second of numbered images; default: 25")
    clips.add_argument(
        "--deinterlace", action="store_true", help="make one frame of the two moments in each of an interlaced clip"
    )
    clips.add_argument(
        "--frames-per-chunk", type=int, metavar="N", help="frames that a video model sees at once; default: its own"
    )
    clips.add_argument("--chunk-overlap", type=int, metavar="N", help="frames that two chunks have in common; default: a quarter")
    clips.add_argument("--resume", action="store_true", help="go on after the frames that an interrupted run has finished")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist; without it a folder's finished images are skipped"
    )
    add_debug(parser)
    parser.set_defaults(run=run)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 100, but is {text!r}")
    return int(text)


_FOR_IMAGES = ("format", "quality", "keep_hidden_colors", "recursive")
_FOR_CLIPS = ("codec", "crf", "fps", "deinterlace", "frames_per_chunk", "chunk_overlap", "resume")
_VIDEO_CHECKPOINT = "video-w4a4"  # enlarges clips unless another is named, once it ships


def _refuse(options: argparse.Namespace, names: Sequence[str], what: str) -> None:
    """Raises UsageError when an option is given that is for the other kind of file."""
    for name in names:
        given = getattr(options, name)
        if given is not None and given is not False:  # 0 is given, too
            raise UsageError(f"--{name.replace('_', '-')} is for {what}, but there are none among the inputs. Leave it out.")


def _fetch(options: argparse.Namespace, default: str) -> Path:
    """The checkpoint's folder; its name is put into `options` where none was given."""
    options.model = options.model or default
    return fetch(options.model)


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 if any image or clip failed, in whichever process."""
    if are_clips(options.inputs, options.output):
        return _run_clips(options)
    _refuse(options, _FOR_CLIPS, "clips")
    output = OutputOptions(options.output, options.format, options.quality, options.overwrite)
    jobs, left_out = plan_jobs(options.inputs, options.upscale, output, options.recursive)
    processes = join_processes(options.device)
    # One list for all: another process may look at the folders later, when some outputs are there already.
    plan = processes.of_main(sort_out(jobs, output.overwrite))
    if processes.is_main:
        for refusal in plan.refusals:
            say(f"qartsr: error: {refusal}", error=True)
        if plan.skipped:
            say(f"{plan.skipped} of {len(jobs)} images are skipped: their output exists already (--overwrite redoes them)")
    counts, pending = Counts(), processes.share(plan.pending)
    if pending:
        folder = _fetch(options, DEFAULT_CHECKPOINT)
        if named_class(read_model_index(folder)) == VIDEO_PIPELINE_CLASS:
            raise UsageError(
                f"{options.model} is a model for clips, but {pending[0].source} is an image. Give it a clip, or "
                f"choose a model for images: --model {DEFAULT_CHECKPOINT}."
            )
        # Imported only now: neither a finished folder nor a checkpoint that does not exist needs torch.
        from qartsr_pipeline.cli.upscale_images import ModelOptions, load_pipeline, upscale_images
        from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

        pipeline = load_pipeline(folder, options.device, options.dtype, processes, QArtSRPipeline)
        model_options = ModelOptions(
            options.upscale,
            options.tile_size,
            options.tile_overlap,
            None if options.color_fix == "none" else options.color_fix or "wavelet",
            options.keep_hidden_colors,
            options.fidelity,
        )
        counts = upscale_images(pipeline, pending, model_options, output, processes, options.debug)
    counts = sum(processes.gather(counts), Counts(0, plan.skipped, len(plan.refusals), tuple(plan.refusals)))
    if processes.is_main:
        for line in [*left_out, *(counts.summary() if len(jobs) > 1 else [])]:
            say(line)
    return 2 if counts.failed else 0


def _run_clips(options: argparse.Namespace) -> int:
    _refuse(options, _FOR_IMAGES, "images")
    files = ClipOptions(
        options.output, options.codec, options.crf, options.fps, options.deinterlace, options.resume, options.overwrite
    )
    import_av()  # whether it is there at all, before anything is loaded
    jobs, left_out = plan_clips(options.inputs, options.upscale, files)
    processes = join_processes(options.device)
    counts, pending = Counts(what="clips"), processes.share(processes.of_main(jobs))
    if pending:
        folder = _fetch(options, _VIDEO_CHECKPOINT if _VIDEO_CHECKPOINT in shipped_checkpoints() else DEFAULT_CHECKPOINT)
        from qartsr_pipeline.cli.upscale_clips import ClipModelOptions, load_model, upscale_clips
        from qartsr_pipeline.video_files.reading import open_clip

        if (
            len(jobs) + len(left_out) == 1
        ):  # what is wrong with it is said before a model is loaded; of several clips, the others are enlarged
            open_clip(jobs[0].source, options.fps)
        model_options = ClipModelOptions(
            options.upscale,
            options.tile_size,
            options.tile_overlap,
            options.color_fix,
            options.frames_per_chunk,
            options.chunk_overlap,
            options.fidelity,
        )
        model, facts = load_model(folder, options.device, options.dtype, model_options, processes)
        counts = upscale_clips(model, facts, pending, model_options, files, processes, options.debug)
    counts = sum(processes.gather(counts), Counts(0, len(left_out), what="clips"))
    if processes.is_main:
        for line in [*left_out, *(counts.summary() if len(jobs) + len(left_out) > 1 else [])]:
            say(line)
    return 2 if counts.failed else 0
