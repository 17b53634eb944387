"""`compare`: photographs enlarged by several models, on a page where any two results are laid over each other."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms

from qartsr_pipeline.calibration.evaluation.api import Model, load_model, named_models
from qartsr_pipeline.calibration.evaluation.measurement import BICUBIC
from qartsr_pipeline.calibration.evaluation.peers import names_of_results
from qartsr_pipeline.checkpoint_files import check_checkpoint, fetch
from qartsr_pipeline.image.comparison_page import Comparison, NamedImage, check_page_size, comparison_page
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.image_files import READABLE_SUFFIXES, ImageFile, ImageFileError, read_image
from qartsr_pipeline.input_checks import check_upscale
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.whole_files import check_place, write_whole

WARM_UP = 16  # side of what a model enlarges before its time is taken


@dataclass(frozen=True)
class ComparisonPage:
    """What `compare` has written.

    Attributes:
        path: of the page.
        size: its bytes.
        seconds: model -> seconds for each photograph, in their order; without loading the model and preparing its weights.
        notices: what could not be taken over from a file, one sentence each.
    """

    path: Path
    size: int
    seconds: dict[str, list[float]]
    notices: list[str]


@dataclass
class _Photograph:
    """A photograph that was read, and its versions so far."""

    path: Path
    title: str
    file: ImageFile
    size: tuple[int, int]
    images: list[NamedImage] = field(default_factory=list)


def compare(
    photographs: str | os.PathLike | Sequence[str | os.PathLike],
    models: Model | Sequence[Model] | Mapping[str, Model],
    page: str | os.PathLike,
    *,
    outputs: Mapping[str, str | os.PathLike] | None = None,
    upscale: float = 4,
    tile_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> ComparisonPage:
    """Enlarges photographs with several models and writes one HTML file that shows the results over each other. Prints nothing.

    The page holds all images without loss, needs no network, and can be passed on as it is. It shows each photograph's bicubic
    enlargement, each model's, and those of other programs. What can be checked is checked before anything is
    computed. One model is in memory at a time.

    Args:
        photographs: image files.
        models: as in `evaluate`; none if only `outputs` are to be compared.
        page: the HTML file.
        outputs: name -> what another program made of the photographs: its file, or a folder in which it is named after the
            photograph, with or without "_x4" (for `upscale` 4), "x4" or "_out" at the end. Its size is what `upscale` gives.
        upscale: enlargement, above 0 and up to 16.
        tile_size: as in `QArtSRPipeline.__call__`.
        device, dtype: for models that are loaded here; None for the CPU and what the folder stores. A pipeline stays as it is.
        overwrite: replace the page if it exists.
        progress: called with a model's name, and how many of how many enlargements are done.

    Raises:
        FileExistsError: the page exists already.
        ImageFileError: a photograph or output cannot be read. SavingError: the page cannot be written. Nothing is left behind.
        ValueError: an output is missing, ambiguous or of another size; two versions have the same name; the page would be too
            large for a browser.
        CheckpointError: a model that is damaged or unavailable.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from qartsr_pipeline.calibration.evaluation import compare
        >>> folder = Path(tempfile.mkdtemp())
        >>> Image.radial_gradient("L").resize((24, 16)).save(folder / "disc.png")
        >>> written = compare(folder / "disc.png", ["tiny-w4a4"], folder / "page.html")
        >>> written.path.name, list(written.seconds)
        ('page.html', ['tiny-w4a4'])
    """
    page = Path(page)
    check_upscale(upscale)
    check_page(page, overwrite)
    loaded = [_read(path, upscale) for path in ([photographs] if isinstance(photographs, (str, os.PathLike)) else photographs)]
    if not loaded:
        raise ValueError("`photographs` is empty: give at least one image file")
    named = named_models(models) if isinstance(models, (QArtSRPipeline, str, os.PathLike)) or models else {}
    outputs = dict(outputs or {})
    _check_names([BICUBIC, *named, *outputs])
    _name_photographs(loaded)
    check_page_size([(photograph.title, photograph.size, 1 + len(named) + len(outputs)) for photograph in loaded])
    folders = {name: model if isinstance(model, QArtSRPipeline) else fetch(model) for name, model in named.items()}
    for folder in folders.values():
        if isinstance(folder, Path):
            check_checkpoint(folder)
    others = [
        {name: _output(photograph, name, Path(place), upscale, len(loaded)) for name, place in outputs.items()}
        for photograph in loaded
    ]

    for photograph in loaded:
        photograph.images.append(NamedImage(BICUBIC, _bicubic(_displayed(photograph.file), photograph.size)))
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    total = len(folders) * len(loaded)
    for number, (name, source) in enumerate(folders.items()):
        if isinstance(source, QArtSRPipeline):
            pipeline = source
        else:
            pipeline = load_model(source, dtype, device)
            pipeline.set_progress_bar_config(disable=True)
        # The first call prepares the weights, which would make quantized models look slow.
        _enlarged(pipeline, ImageFile(loaded[0].file.pixels[:WARM_UP, :WARM_UP]), upscale, tile_size)
        for index, photograph in enumerate(loaded, 1):
            pixels, taken = _enlarged(pipeline, photograph.file, upscale, tile_size)
            photograph.images.append(NamedImage(name, pixels, f"{taken:.2f} s"))
            seconds[name].append(taken)
            if progress:
                progress(name, number * len(loaded) + index, total)
        del pipeline  # makes room for the next one
    for photograph, found in zip(loaded, others, strict=True):
        photograph.images += [NamedImage(name, pixels) for name, pixels in found.items()]

    comparisons = [_comparison(photograph, upscale) for photograph in loaded]
    title = loaded[0].title if len(loaded) == 1 else f"{len(loaded)} photographs"
    facts = "Seconds are those of the whole call, once the model has enlarged something small." if seconds else ""
    content = comparison_page(f"{title}, enlarged {upscale:g} times", comparisons, facts)
    check_page(page, overwrite)
    write_whole(page, content)
    notices = [notice for photograph in loaded for notice in photograph.file.notices]
    return ComparisonPage(page, len(content), seconds, notices)


def check_page(page: Path, overwrite: bool) -> None:
    """Raises ImageFileError, FileExistsError or SavingError if the page cannot be written, before there is anything to write."""
    if page.suffix.lower() not in (".html", ".htm"):
        raise ImageFileError(f"{page} does not end in .html, but an HTML page is written. Give it such a name.")
    if page.is_file() and not overwrite:
        raise FileExistsError(f"{page} exists already. Add --overwrite (`overwrite=True`) to replace it, or give another name.")
    check_place(page)


def find_output(place: Path, photograph: Path, upscale: float) -> Path:
    """The file that another program made of a photograph.

    Args:
        place: the file itself; or a folder in which it has one of `names_of_results`.

    Raises:
        FileNotFoundError: there is none. ValueError: there are several.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise FileNotFoundError(f"There is no file or folder {place}. Check the name and the folder you are in ({Path.cwd()}).")
    stems = names_of_results(photograph.stem, upscale)
    files = [file for file in sorted(place.iterdir()) if file.suffix.lower() in READABLE_SUFFIXES and file.stem in stems]
    files = [file for file in files if file.resolve() != photograph.resolve()]
    if not files:
        raise FileNotFoundError(
            f"The folder {place} has no image of {photograph.name}: none is called {' or '.join(stems)}. Rename it, or give the"
            " file itself."
        )
    if len(files) > 1:
        raise ValueError(
            f"The folder {place} has several images of {photograph.name}: {', '.join(file.name for file in files)}. Remove those"
            " that are not meant, or give the file itself."
        )
    return files[0]


def _read(path: str | os.PathLike, upscale: float) -> _Photograph:
    path = Path(path)
    file = read_image(path)
    return _Photograph(path, path.name, file, enlarged_size((file.height, file.width), upscale))


def _name_photographs(photographs: Sequence[_Photograph]) -> None:
    """Photographs of the same name are called by their paths. Raises ValueError if one is given twice."""
    names = [photograph.path.name for photograph in photographs]
    places = [photograph.path.resolve() for photograph in photographs]
    for photograph, place in zip(photographs, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{photograph.path} is given twice: name each photograph once")
        if names.count(photograph.path.name) > 1:
            photograph.title = str(photograph.path)


def _check_names(names: list[str]) -> None:
    if len(names) < 2:
        raise ValueError("there is nothing to compare with bicubic enlargement: give at least one model, or outputs")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"several versions would be called {', '.join(twice)}: give each model and each output a name of its own"
        )


def _output(photograph: _Photograph, name: str, place: Path, upscale: float, count: int) -> np.ndarray:
    """Another program's enlargement of the photograph, (H, W, 3) uint8."""
    try:
        if place.is_file() and count > 1:
            raise ValueError(f"{place} is one image, but there are {count} photographs. Give a folder with an image of each.")
        path = find_output(place, photograph.path, upscale)
    except (OSError, ValueError) as error:
        raise type(error)(f"outputs {name}: {error}") from error
    pixels = _displayed(read_image(path))
    height, width = photograph.size
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"outputs {name}: {path} has {pixels.shape[1]} x {pixels.shape[0]} pixels, but {photograph.title} enlarged"
            f" {upscale:g} times has {width} x {height}. Make it anew at this size, leave it out, or give its enlargement as"
            " --scale (`upscale`)."
        )
    return pixels


def _displayed(file: ImageFile) -> np.ndarray:
    """The image as a browser shows it: (H, W, 3) uint8 in sRGB, transparent parts over white."""
    pixels = file.pixels if not file.sixteen_bit else np.rint(file.pixels / 257).astype(np.uint8)
    colour = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]
    image = _in_srgb(Image.fromarray(np.ascontiguousarray(colour)), file.metadata.icc_profile)
    if file.has_alpha:
        alpha = Image.fromarray(np.ascontiguousarray(pixels[..., -1]))
        image = Image.composite(image, Image.new("RGB", image.size, "white"), alpha)
    return np.asarray(image)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """As RGB; a profile for another kind of image, or a damaged one, is ignored, as other programs do."""
    if profile:
        try:
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
            if converted is not None:  # None is for conversions in place
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")


def _bicubic(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _enlarged(pipeline: QArtSRPipeline, file: ImageFile, upscale: float, tile_size: int | None) -> tuple[np.ndarray, float]:
    """The pipeline's enlargement, (H, W, 3) uint8, and the seconds that the call took."""
    start = time.perf_counter()
    result: np.ndarray = pipeline(file.pixels, upscale, tile_size, output_type="np", return_dict=False)[0][0]
    seconds = time.perf_counter() - start
    if file.pixels.shape[2] <= 2:  # back to one channel, because its profile is one for grey
        result = np.delete(result, (1, 2), axis=2)
    return _displayed(ImageFile(np.rint(result * 255).astype(np.uint8), file.metadata)), seconds


def _comparison(photograph: _Photograph, upscale: float) -> Comparison:
    note = f"{photograph.file.width} × {photograph.file.height}, enlarged {upscale:g} times"
    return Comparison(photograph.title, photograph.images, note)
