"""Images that do not fit into memory as a whole are enlarged in bands, with the same result."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qartsr_pipeline import bands, memory
from qartsr_pipeline.bands import enlarge_in_bands
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.image_files import ImageFile, read_image, write_image
from qartsr_pipeline.memory import NotEnoughMemory
from tiny_models import build_tiny_pipeline

PLENTY = 10**12


@pytest.fixture(scope="module")
def pipe():
    pipe = build_tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 40)),
    st.integers(1, 4),
    st.sampled_from([np.uint8, np.uint16]),
    st.sampled_from([(64, None), (64, 0), (64, 48), (96, 40), (None, None)]),
    st.sampled_from(["wavelet", None]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
)
def test_bands_are_what_a_call_gives(pipe, size, channels, kind, tiles, color_fix, fidelity, kept):
    image = np.random.default_rng(size[0]).integers(0, np.iinfo(kind).max, (*size, channels), kind)
    options = {"tile_size": tiles[0], "tile_overlap": tiles[1], "color_fix": color_fix, "fidelity": fidelity}
    options |= {"keep_hidden_colors": kept}
    found = enlarge_in_bands(pipe, image, **options, free=PLENTY)
    if tiles[0] is None:
        options["tile_size"] = 1024
    expected = pipe(image, output_type="np", **options).images[0]
    assert (found.height, found.width) == expected.shape[:2]
    np.testing.assert_allclose(np.concatenate(list(found)), expected, atol=1e-5)


def test_a_file_is_written_as_a_whole_or_in_bands(tmp_path):
    pixels = np.random.default_rng(0).random((300, 20, 4)).astype(np.float32)

    class Bands:
        height = 300

        def __iter__(self):
            return iter(np.split(pixels, [1, 40, 290]))

    for source in (np.zeros((75, 5, 4), np.uint8), np.zeros((75, 5, 2), np.uint16)):
        for name in ("a.png", "a.jpg", "a.tif"):
            said = write_image(tmp_path / name, pixels, ImageFile(source))
            whole = (tmp_path / name).read_bytes()
            assert write_image(tmp_path / name, Bands(), ImageFile(source)) == said
            assert (tmp_path / name).read_bytes() == whole


def test_the_command_does_so_where_memory_is_short(tiny_folder, tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    options = ["--model", str(tiny_folder), "--device", "cpu", "--tile-size", "64", "--overwrite"]
    command = ["upscale", str(tmp_path / "a.png"), *options]
    assert main(command) == 0
    whole = read_image(tmp_path / "a_x4.png").pixels
    for module in (memory, bands):
        monkeypatch.setattr(module, "free_main_memory", lambda: 1000)
    assert main(command) == 2
    assert "enlarged to 120 x 160 in bands needs about" in capsys.readouterr().err
    monkeypatch.setattr(bands, "free_main_memory", lambda: PLENTY)
    assert main(command) == 0
    assert np.array_equal(read_image(tmp_path / "a_x4.png").pixels, whole)
    for option in (["--upscale", "2"], ["--color-fix", "adain"]):
        assert main([*command, *option]) == 2
        assert "With --upscale 4 and --color-fix wavelet, larger images fit." in capsys.readouterr().err


def test_what_is_said_to_fit_in_bands_does(pipe):
    with pytest.raises(NotEnoughMemory, match="At most about (.*) pixels would fit") as told:
        enlarge_in_bands(pipe, np.zeros((3000, 2000, 3), np.uint8), free=10**9)
    width, height = map(int, str(told.value).split("At most about ")[1].split(" pixels")[0].split(" x "))
    assert width > 500
    enlarge_in_bands(pipe, np.zeros((height, width, 3), np.uint8), free=10**9)
    with pytest.raises(NotEnoughMemory, match="are free. Close other programs") as told:  # nothing fits
        enlarge_in_bands(pipe, np.zeros((3000, 2000, 3), np.uint8), free=10**6)
    assert "0 x 0" not in str(told.value)
