"""The command line: what it writes, what it says, and that every bad input ends in one line and exit code 2."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from qartsr_pipeline.cli.device import choose_device, choose_dtype
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image_files import ImageFile, Metadata, read_image, write_image
from qartsr_pipeline.kernels.cpu import has_bfloat16
from qartsr_pipeline.offloading import quantized_layers
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def upscale(tiny_folder):
    return lambda *arguments: main(["upscale", "--model", str(tiny_folder), *map(str, arguments)])


def error_lines(capsys):
    """The lines on stderr; none of them may come from a traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return [line for line in text.splitlines() if line.startswith("qartsr: error: ")]


def test_default_output_stands_beside_the_input(upscale, photo, capsys):
    assert upscale(photo) == 0
    with Image.open(photo.with_name("photo_x4.png")) as result:
        assert result.size == (28, 36)
    said = capsys.readouterr().out
    assert "full-precision model" in said and "device: cpu (" in said
    assert re.search(r"dtype: (float32|bfloat16) \(this processor ", said)
    assert "kernels:" not in said


def test_the_kernels_that_will_run_are_printed(photo, capsys, monkeypatch):
    monkeypatch.setenv("QARTSR_BACKEND", "reference")
    assert main(["upscale", "--model", "tiny-w2a2", str(photo)]) == 0
    quantized = len(quantized_layers(QArtSRPipeline.from_pretrained("tiny-w2a2")))
    assert f"kernels: {quantized} layers reference\n" in capsys.readouterr().out


@pytest.mark.parametrize("name, stored", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF"), ("same", "PNG")])
def test_the_format_of_results_can_be_chosen(upscale, photo, tmp_path, name, stored):
    suffix = "png" if name == "same" else name
    assert upscale(photo, "--format", name) == 0
    assert upscale(tmp_path, "--format", name, "-o", tmp_path / "out") == 0
    for path in (tmp_path / f"photo_x4.{suffix}", tmp_path / "out" / f"photo_x4.{suffix}"):
        with Image.open(path) as result:
            assert result.format == stored and result.size == (28, 36)


def test_the_format_of_the_input_is_kept_where_it_can_be_written(upscale, photo, tmp_path, capsys):
    with Image.open(photo) as image:
        for name in ("a.JPG", "b.gif", "c.webp"):
            image.save(tmp_path / name)
    names = [tmp_path / name for name in ("a.JPG", "b.gif", "c.webp")]
    assert upscale(*names, "--format", "same", "-o", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a_x4.JPG", "b_x4.png", "c_x4.webp"]
    assert "note: b.gif: results cannot be written in this format; a PNG is written instead." in capsys.readouterr().out


def test_a_lower_quality_makes_smaller_files_and_what_a_format_cannot_hold_is_said(upscale, tmp_path, capsys):
    source, sizes = write_deep_image(tmp_path / "deep.png", channels=4), []
    for quality in (90, 20):
        assert upscale(source, "--format", "jpg", "--quality", quality, "-o", tmp_path / str(quality)) == 0
        sizes.append((tmp_path / str(quality) / "deep_x4.jpg").stat().st_size)
    assert sizes[1] < sizes[0]
    said = capsys.readouterr().out
    assert "note: JPEG holds no transparency" in said and "note: JPEG holds 8 bits" in said


def test_any_factor_tiles_and_format(upscale, photo, tmp_path):
    assert upscale(photo, "--upscale", 2.5, "--tile-size", 64, "--color-fix", "none", "-o", tmp_path / "out.jpg") == 0
    with Image.open(tmp_path / "out.jpg") as result:
        assert (result.format, result.size) == ("JPEG", (18, 22))


def test_sixteen_bits_alpha_and_profile_go_through(upscale, tmp_path):
    source = write_deep_image(tmp_path / "deep.png", channels=4)
    assert upscale(source) == 0
    result = read_image(tmp_path / "deep_x4.png")
    assert result.pixels.shape == (32, 24, 4) and result.sixteen_bit and result.metadata.icc_profile
    assert len(np.unique(result.pixels & 255)) > 200, "the low bytes carry something"


def write_deep_image(path, channels):
    """A 16-bit image file with a profile; returns its path."""
    pixels = np.random.default_rng(0).integers(0, 65535, (8, 6, channels), dtype=np.uint16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    write_image(path, pixels / 65535, ImageFile(pixels, Metadata(icc_profile=profile)))
    return path


def test_a_folder_goes_into_a_new_folder_and_one_bad_image_stops_nothing(upscale, photo, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "c.png"):
        (images / name).write_bytes(photo.read_bytes())
    (images / "b.png").write_text("no image")
    (images / "notes.txt").write_text("ignored")
    assert upscale(images, "-o", tmp_path / "new" / "folder") == 2
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["a_x4.png", "c_x4.png"]
    output = capsys.readouterr()
    assert "3 images: 2 written, 1 failed" in output.out and output.err.count("qartsr: error:") == 1
    assert "left out: 1 file of other kinds (1 .txt)" in output.out


def test_a_second_run_over_a_folder_leaves_the_results_of_the_first_alone(upscale, photo):
    assert upscale(photo.parent) == 0
    assert upscale(photo.parent, "--overwrite") == 0
    assert not photo.with_name("photo_x4_x4.png").exists()


def test_nothing_is_overwritten_unasked(upscale, photo, capsys):
    target = photo.with_name("photo_x4.png")
    target.write_bytes(b"precious")
    assert upscale(photo) == 2 and target.read_bytes() == b"precious"
    assert "--overwrite" in error_lines(capsys)[0]
    assert upscale(photo, "--overwrite") == 0 and target.read_bytes() != b"precious"
    before = photo.read_bytes()
    assert upscale(photo, "--overwrite", "-o", photo) == 2 and photo.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--upscale", "0"], "upscale"),
        (["--upscale", "-2"], "upscale"),
        (["--upscale", "100"], "upscale"),
        (["--upscale", "nan"], "upscale"),
        (["--tile-size", "1"], "tile_size"),
        (["--tile-size", "64", "--tile-overlap", "64"], "tile_overlap"),
        (["--device", "mps"], "has no such device here"),
        (["--device", "cuda:7"], "has no such device here, only cpu"),
        (["-o", "out.png", "--format", "jpg"], "out.png is a PNG file by its suffix, but --format asks for jpg"),
        (["--quality", "80"], "--quality is for JPEG and WebP"),
        (["-o", "out.xyz"], "does not end in a known image format"),
        (["-o", "photo.png/out.png"], "photo.png is a file, not a folder"),
        (["photo.png", "-o", "missing.png"], "several images"),
        (["--model", "no/such/model"], "There is no folder"),
        (["--model", "photo.png"], "is a file, but a checkpoint is a folder"),
    ],
)
def test_bad_arguments(upscale, photo, capsys, monkeypatch, arguments, expected):
    monkeypatch.chdir(photo.parent)
    before = sorted(photo.parent.rglob("*"))
    assert upscale("photo.png", *arguments) == 2
    lines = error_lines(capsys)
    assert len(lines) == 1 and expected in lines[0]
    assert sorted(photo.parent.rglob("*")) == before


def test_bad_images(upscale, photo, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:60])
    (tmp_path / "text.png").write_text("no image")
    assert upscale(tmp_path / "cut.png", tmp_path / "text.png", tmp_path / "none.png") == 2
    lines = error_lines(capsys)
    assert [word in line for word, line in zip(("damaged", "not an image", "no file"), lines, strict=True)] == [True] * 3


def test_empty_folder_and_damaged_checkpoint(upscale, photo, tiny_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert upscale(tmp_path / "empty") == 2
    (tiny_folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 20)
    assert upscale(photo) == 2
    first, second = error_lines(capsys)
    assert "holds no images" in first and "not a safetensors file" in second


def test_debug_shows_the_traceback(upscale, tmp_path, capsys):
    assert upscale(tmp_path / "none.png", "--debug") == 2
    text = capsys.readouterr().err
    assert "Traceback" in text and text.splitlines()[-1].startswith("qartsr: error: ")


def test_an_interruption_that_a_library_makes_another_error_of_is_one(upscale, photo, capsys, monkeypatch):
    def swallowing(*arguments):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("maximum recursion depth exceeded") from None

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("qartsr_pipeline.cli.upscale.plan_jobs", swallowing)
    assert upscale(photo) == 130
    assert "qartsr: interrupted (RecursionError" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is before


def test_interruption_leaves_nothing_behind(upscale, photo, capsys, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    before = sorted(photo.parent.iterdir())
    monkeypatch.setattr(QArtSRPipeline, "__call__", interrupt)
    assert upscale(photo) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(path for path in photo.parent.iterdir()) == before


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 3.00 GiB", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_names_the_way_out(upscale, photo, capsys, monkeypatch, text):
    def exhaust(*arguments, **options):
        raise RuntimeError(text)

    monkeypatch.setattr(QArtSRPipeline, "__call__", exhaust)
    assert upscale(photo) == 2
    assert "--tile-size" in error_lines(capsys)[0]


def test_device_and_dtype_are_chosen_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert choose_device("auto") == ("cuda", "found a GPU")
    for asked in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert choose_device(asked) == (asked, "as asked")
    assert choose_device("cuda", own="cuda:1")[0] == "cuda:1"
    with pytest.raises(UsageError, match="--device cuda:2: .* has no such device here, only cuda:0, cuda:1, cpu"):
        choose_device("cuda:2")
    capabilities = {"cuda": (9, 0), "cuda:0": (8, 0), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert [choose_dtype("auto", device)[0] for device in capabilities] == [torch.bfloat16, torch.bfloat16, torch.float16]


def test_a_cpu_computes_in_bfloat16_if_it_has_it_and_says_what_it_costs_otherwise(monkeypatch):
    for has_it, auto in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("qartsr_pipeline.cli.device.has_bfloat16", lambda has_it=has_it: has_it)
        assert choose_dtype("auto", "cpu")[0] == auto and choose_dtype("float16", "cpu")[0] == torch.float32
        dtype, reason = choose_dtype("bfloat16", "cpu")
        assert dtype == torch.bfloat16 and ("many times as long" in reason) != has_it
        assert choose_dtype("float32", "cpu") == (torch.float32, "as asked")


def test_devices_of_other_kinds_are_not_judged_by_the_processor(monkeypatch):
    monkeypatch.setattr("qartsr_pipeline.cli.device.has_bfloat16", lambda: True)
    assert [choose_dtype("auto", kind)[0] for kind in ("xpu", "privateuseone")] == [torch.float32, torch.float32]


def test_without_onednn_there_is_no_bfloat16(monkeypatch):
    """Builds of torch for macOS lack the operator, too."""
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", None)
    assert not has_bfloat16.__wrapped__()


def test_bfloat16_needs_instructions_for_it(monkeypatch):
    """oneDNN would take it on any processor with AVX512."""
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    for machine, instructions, expected in (("x86_64", True, True), ("x86_64", False, False), ("aarch64", False, True)):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda instructions=instructions: instructions)
        assert has_bfloat16.__wrapped__() == expected


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--device", "tpu"], "argument --device: must be auto, cuda, cuda:N, mps or cpu, but is 'tpu'"),
        (["--device", "cuda:x"], "'cuda:x'"),
        (["--quality", "101"], "argument --quality: must be an integer from 1 to 100, but is '101'"),
        (["--format", "bmp"], "argument --format: invalid choice: 'bmp'"),
    ],
)
def test_arguments_that_mean_nothing_are_usage_errors(capsys, arguments, expected):
    with pytest.raises(SystemExit) as caught:
        main(["upscale", "photo.png", *arguments])
    assert caught.value.code == 2 and expected in capsys.readouterr().err


def test_help_and_usage_errors_are_quick():
    """Neither imports torch: that alone would take seconds."""
    start = "import sys; from qartsr_pipeline.cli.main import main"
    program = f"{start}\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for arguments, code in ((["--help"], 0), (["upscale"], 2), (["upscale", "x.png", "--model", "a/b/c"], 0)):
        result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert result.returncode == code and result.stdout.splitlines()[-1] == "False", result


def test_an_input_is_never_overwritten_by_the_result_of_another(tiny_folder, tmp_path, capsys):
    first, second = tmp_path / "photo.png", tmp_path / "photo_x4.png"
    for path, colour in ((first, "red"), (second, "blue")):
        Image.new("RGB", (16, 16), colour).save(path)
    before = second.read_bytes()
    code = main(["upscale", str(first), str(second), "--overwrite", "--model", str(tiny_folder), "--device", "cpu"])
    assert code == 2 and second.read_bytes() == before
    assert "photo_x4.png is another of the inputs" in capsys.readouterr().err
