"""The pipeline's contract, on a random network: sizes, kinds of images, results, callbacks, saving, errors."""

import json
from fractions import Fraction

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, DiffusionPipeline

from qartsr_pipeline import overflow
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from tiny_models import build_tiny_pipeline

PHOTO = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)


def photo(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(PHOTO).convert(mode)


@pytest.mark.parametrize("upscale", [4, 1, 2.5, 0.3, 16, np.float32(3)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (13, 5), (33, 32)])
def test_the_size_is_exactly_what_was_asked_for(tiny_pipeline, size, upscale):
    image = np.zeros((*size, 3), dtype=np.uint8)
    result = tiny_pipeline(image, upscale=upscale, output_type="np").images
    assert result.shape == (1, *(max(1, round(side * float(upscale))) for side in size), 3)


@pytest.mark.parametrize("mode, expected", [("1", "L"), ("L", "L"), ("LA", "LA"), ("P", "RGB"), ("RGB", "RGB"), ("RGBA", "RGBA")])
def test_pil_modes_are_kept(tiny_pipeline, mode, expected):
    result = tiny_pipeline(photo(mode)).images[0]
    assert result.mode == expected and result.size == (136, 84)


def test_sixteen_bit_greyscale_stays_sixteen_bit(tiny_pipeline):
    values = np.random.default_rng(1).integers(0, 65536, (9, 8), dtype=np.uint16)
    result = tiny_pipeline(PIL.Image.fromarray(values)).images[0]
    assert result.mode == "I;16" and len(np.unique(np.asarray(result) % 256)) > 100


def test_alpha_is_enlarged_and_opaque_images_are_treated_as_without(tiny_pipeline):
    rgba = photo("RGBA")
    assert np.array_equal(np.asarray(tiny_pipeline(rgba).images[0])[..., :3], np.asarray(tiny_pipeline(photo()).images[0]))
    alpha = PIL.Image.new("L", rgba.size, 0)
    alpha.paste(255, (10, 5, 34, 21))
    rgba.putalpha(alpha)
    result = np.asarray(tiny_pipeline(rgba).images[0])[..., 3]
    assert (result[:10] == 0).all() and (result[40:, 60:] == 255).all()


def test_results_come_in_the_form_asked_for(tiny_pipeline):
    array = tiny_pipeline(photo(), output_type="np").images
    tensor = tiny_pipeline(photo(), output_type="pt").images
    pil = tiny_pipeline(photo()).images
    assert array.dtype == np.float32 and array.shape == (1, 84, 136, 3) and 0 <= array.min() and array.max() <= 1
    assert tensor.shape == (1, 3, 84, 136) and np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert np.array_equal(np.asarray(pil[0]), (array[0] * 255).round().astype(np.uint8))
    assert tiny_pipeline(photo(), output_type="latent").images.shape == (1, 4, 64, 68)
    (as_tuple,) = tiny_pipeline(photo(), output_type="np", return_dict=False)
    assert np.array_equal(as_tuple, array)


def test_a_batch_gives_what_its_images_give_alone(tiny_pipeline):
    mixed = [photo(), photo("L").crop((0, 0, 9, 5)), torch.rand(2, 3, 6, 7)]
    together = tiny_pipeline(mixed, output_type="np").images
    assert [one.shape for one in together] == [(84, 136, 3), (20, 36, 3), (24, 28, 3), (24, 28, 3)]
    alone = [*tiny_pipeline(mixed[0], output_type="np").images, *tiny_pipeline(mixed[2], output_type="np").images]
    assert all(np.array_equal(one, other) for one, other in zip([together[0], *together[2:]], alone, strict=True))
    assert np.array_equal(together[1][..., 0], together[1][..., 2])


def test_the_formula_is_the_one_of_one_step_diffusion(tiny_pipeline):
    pipe, x = tiny_pipeline, torch.rand(1, 3, 32, 32)
    up = torch.nn.functional.interpolate(x, size=(128, 128), mode="bicubic", antialias=True) * 2 - 1
    alpha_bar = pipe.scheduler.alphas_cumprod[250]
    with torch.no_grad():
        z = pipe.vae.encode(up).latent_dist.mode() * 0.5
        eps = pipe.unet(z, 250, encoder_hidden_states=pipe.prompt_embedding.embedding).sample
        z_h = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        expected = (pipe.vae.decode(z_h / 0.5).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(pipe(x, output_type="pt", color_fix=None).images, expected, atol=1e-5)
    assert torch.allclose(pipe(x, output_type="latent").images, z_h, atol=1e-4)


def test_calls_are_deterministic_and_sampling_follows_the_generator(tiny_pipeline):
    def call(**arguments):
        return tiny_pipeline(photo(), output_type="np", color_fix=None, **arguments).images

    def seeded(seed):
        return call(sample_posterior=True, generator=torch.Generator().manual_seed(seed))

    assert np.array_equal(call(), call())
    assert np.array_equal(seeded(1), seeded(1))
    assert not np.array_equal(seeded(1), seeded(2)) and not np.array_equal(seeded(1), call())


@pytest.mark.parametrize("color_fix", ["wavelet", "adain"])
def test_color_fix_brings_the_tone_back(tiny_pipeline, color_fix):
    flat = np.full((40, 40, 3), (0.2, 0.5, 0.7), dtype=np.float32)
    aligned = tiny_pipeline(flat, output_type="np", color_fix=color_fix).images[0]
    raw = tiny_pipeline(flat, output_type="np", color_fix=None).images[0]
    assert np.abs(aligned.mean((0, 1)) - flat[0, 0]).max() < 0.01 < np.abs(raw.mean((0, 1)) - flat[0, 0]).max()


@pytest.mark.parametrize("color_fix", ["wavelet", None])
def test_fidelity_is_the_share_of_the_plain_enlargement(tiny_pipeline, color_fix):
    kept = []

    def call(**arguments):
        arguments |= {"callback_on_step_end": lambda pipe, step, timestep, tensors: kept.append(tensors["image"])}
        return tiny_pipeline(photo(), output_type="pt", color_fix=color_fix, upscale=4, **arguments).images

    plain = torch.nn.functional.interpolate(
        torch.from_numpy(PHOTO).permute(2, 0, 1)[None] / 255, size=(84, 136), mode="bicubic", antialias=True
    )
    assert torch.equal(call(fidelity=0), call())
    torch.testing.assert_close(call(fidelity=1), plain.clamp(0, 1))
    assert 0.2 < float((call(fidelity=np.float32(0.5)) - plain).abs().mean() / (call() - plain).abs().mean()) < 0.8
    assert all(torch.equal(tile, kept[0]) for tile in kept), "a tile that a callback keeps stays the network's"


@pytest.mark.parametrize("fidelity", [-0.1, 1.5, float("nan"), True, "0.5", None])
def test_a_fidelity_that_is_no_share_is_refused(tiny_pipeline, fidelity):
    with pytest.raises((TypeError, ValueError), match="`fidelity` must be"):
        tiny_pipeline(photo(), fidelity=fidelity)


def test_the_callback_sees_every_tile_and_may_replace_it(tiny_pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe, step, timestep, sorted(tensors)))
        return {"image": torch.zeros_like(tensors["image"])}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["image", "latents"]}
    result = tiny_pipeline([photo(), photo()], tile_size=64, output_type="np", color_fix=None, **arguments)
    assert seen == [(tiny_pipeline, i, 250, ["image", "latents"]) for i in range(tiny_pipeline.num_timesteps)]
    assert tiny_pipeline.num_timesteps == 2 * 2 * 3 and result.images.max() == 0


def test_the_current_tile_is_none_before_the_first_and_then_the_last_one_finished(tiny_pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        tile, grid = pipe.current_tile
        assert tensors["image"].shape[-2:] == (tile.height, tile.width) and tile == list(grid)[step]
        seen.append(tile)
        return {}

    assert tiny_pipeline.current_tile is None
    tiny_pipeline(photo(), tile_size=64, callback_on_step_end=callback)
    assert len(seen) == 6 and tiny_pipeline.current_tile[0] == seen[-1]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    tiny_pipeline.unet.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        tiny_pipeline(photo())
    assert tiny_pipeline.current_tile is None


def test_an_exception_in_the_callback_cancels_and_leaves_the_pipeline_usable(tiny_pipeline):
    def cancel(*_):
        raise KeyboardInterrupt

    before = tiny_pipeline(photo(), tile_size=64, output_type="np").images
    with pytest.raises(KeyboardInterrupt):
        tiny_pipeline(photo(), tile_size=64, callback_on_step_end=cancel)
    assert np.array_equal(tiny_pipeline(photo(), tile_size=64, output_type="np").images, before)


def test_the_progress_bar_counts_tiles_and_can_be_switched_off(tiny_pipeline, capsys):
    tiny_pipeline(photo(), tile_size=64)
    assert capsys.readouterr().err == ""
    tiny_pipeline.set_progress_bar_config(disable=False, desc="tiles")
    tiny_pipeline(photo(), tile_size=64)
    error = capsys.readouterr().err
    assert "tiles: 100%" in error and "6/6" in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saved_and_loaded_pipelines_agree_bit_for_bit(tiny_pipeline, tmp_path, dtype):
    tiny_pipeline.to(dtype).save_pretrained(tmp_path / "saved")
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert loaded.config.timestep == 250 and loaded.config.scale == 4 and loaded.dtype == dtype
    assert isinstance(loaded.prompt_embedding, PromptEmbedding)
    for call in ({}, {"tile_size": 64}):
        results = [pipe(photo(), output_type="np", color_fix=None, **call).images for pipe in (tiny_pipeline, loaded)]
        assert np.array_equal(*results)


def test_saved_folders_hold_checksums_and_no_paths_and_load_generically(tiny_folder, tmp_path):
    listed = json.loads((tiny_folder / "checksums.json").read_text())
    assert {"unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"} <= set(listed)
    again = tmp_path / "again"
    QArtSRPipeline.from_pretrained(tiny_folder).save_pretrained(again)
    assert not any(str(tmp_path) in path.read_text() for path in again.rglob("*.json"))
    generic = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
    assert type(generic) is QArtSRPipeline and generic.config.timestep == 250


def test_loading_never_runs_code_from_the_folder(tiny_folder):
    (tiny_folder / "pipeline.py").write_text("raise SystemExit('executed')")
    assert isinstance(QArtSRPipeline.from_pretrained(tiny_folder), QArtSRPipeline)


def test_from_pipe_shares_components_and_keeps_their_dtype(tiny_pipeline):
    other = QArtSRPipeline.from_pipe(tiny_pipeline.to(torch.bfloat16))
    assert other.unet is tiny_pipeline.unet and other.dtype == torch.bfloat16 and other.config.timestep == 250


def test_pickles_are_refused(tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_pipeline.save_pretrained(tmp_path / "x", safe_serialization=False)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"upscale": 0}, ValueError, ["`upscale`", "above 0", "16", "0"]),
        ({"upscale": -2}, ValueError, ["-2"]),
        ({"upscale": 100}, ValueError, ["100"]),
        ({"upscale": float("nan")}, ValueError, ["nan"]),
        ({"upscale": "4"}, TypeError, ["`upscale`", "'4'"]),
        ({"tile_size": 8}, ValueError, ["`tile_size`", "at least 64", "8"]),
        ({"tile_size": 512.0}, TypeError, ["`tile_size`", "512.0"]),
        ({"tile_size": 128, "tile_overlap": 128}, ValueError, ["`tile_overlap` (128)", "`tile_size` (128)"]),
        ({"tile_overlap": -1}, ValueError, ["`tile_overlap`", "-1"]),
        ({"color_fix": "magic"}, ValueError, ["`color_fix`", "'wavelet', 'adain'", "magic"]),
        ({"output_type": "jpg"}, ValueError, ["`output_type`", "'latent'", "jpg"]),
        ({"generator": 3}, TypeError, ["`generator`", "int"]),
        ({"sample_posterior": 1}, TypeError, ["`sample_posterior`"]),
        ({"callback_on_step_end": 1}, TypeError, ["`callback_on_step_end`"]),
        ({"callback_on_step_end_tensor_inputs": ["eps"]}, ValueError, ["'image', 'latents'", "'eps'"]),
        ({"image": np.full((2, 2, 3), np.nan)}, ValueError, ["`image`", "NaN"]),
        ({"image": torch.zeros(3, 8, 8).to_sparse()}, TypeError, ["`image`", "sparse", "to_dense"]),
        ({"image": [torch.zeros(3, 8, 8, device="meta")]}, TypeError, ["`image[0]`", "meta"]),
        ({"upscale": 10**400}, ValueError, ["`upscale`", "16", "1329 bits"]),
        ({"upscale": 10**5000}, ValueError, ["`upscale`", "bits"]),
        ({"upscale": -(10**400)}, ValueError, ["`upscale`"]),
        ({"upscale": float("inf")}, ValueError, ["inf"]),
        ({"upscale": Fraction(1, 10**400)}, ValueError, ["`upscale`"]),
        ({"upscale": np.float16("nan")}, ValueError, ["nan"]),
        ({"upscale": True}, TypeError, ["`upscale`", "True"]),
        ({"upscale": np.bool_(True)}, TypeError, ["`upscale`"]),
        ({"upscale": np.ones(2)}, TypeError, ["`upscale`", "ndarray"]),
        ({"upscale": 4j}, TypeError, ["`upscale`", "4j"]),
        ({"tile_size": -(10**400)}, ValueError, ["`tile_size`", "bits"]),
        ({"tile_size": True}, TypeError, ["`tile_size`"]),
        ({"tile_overlap": 10**400, "tile_size": 64}, ValueError, ["`tile_overlap`", "bits"]),
        ({"color_fix": ["wavelet"]}, ValueError, ["`color_fix`"]),
        ({"color_fix": np.array(["wavelet", "adain"])}, ValueError, ["`color_fix`"]),
        ({"output_type": None}, ValueError, ["`output_type`", "None"]),
        ({"callback_on_step_end_tensor_inputs": "image"}, TypeError, ["'image', 'latents'", "list"]),
        ({"callback_on_step_end_tensor_inputs": 3}, TypeError, ["'image', 'latents'", "3"]),
        ({"callback_on_step_end_tensor_inputs": [["image"]]}, ValueError, ["'image', 'latents'"]),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(tiny_pipeline, arguments, error, words):
    tiny_pipeline.unet.forward = None  # nothing may get as far as the network
    with pytest.raises(error) as caught:
        tiny_pipeline(**{"image": photo(), **arguments})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "arguments, same",
    [
        ({"tile_size": np.uint8(128)}, {"tile_size": 128}),
        ({"tile_size": np.int64(64), "tile_overlap": np.uint8(32)}, {"tile_size": 64, "tile_overlap": 32}),
        ({"tile_size": 10**400}, {}),
        ({"upscale": np.uint8(16)}, {"upscale": 16}),
        ({"upscale": np.int8(3), "sample_posterior": np.bool_(False)}, {"upscale": 3}),
        ({"upscale": np.float16(2.93)}, {"upscale": 2.9296875}),
        ({"upscale": Fraction(5, 2), "color_fix": np.str_("adain")}, {"upscale": 2.5, "color_fix": "adain"}),
        ({"callback_on_step_end": lambda *_: None, "callback_on_step_end_tensor_inputs": None}, {}),
    ],
)
def test_numbers_may_be_numpys(tiny_pipeline, arguments, same):
    results = [tiny_pipeline(PHOTO[:9, :20], output_type="np", **one).images for one in (arguments, same)]
    assert np.array_equal(*results)


def test_sizes_are_exact_for_numbers_of_few_bits(tiny_pipeline):
    upscale = tiny_pipeline.check_inputs(upscale=np.float16(2.93)).upscale
    assert enlarged_size((1, 700), upscale) == (3, 2051)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_runs_in_the_dtype_it_computes_in(tiny_pipeline, storage):
    expected = tiny_pipeline(PHOTO[:8, :8], output_type="np", color_fix=None).images
    for model in (tiny_pipeline.unet, tiny_pipeline.vae):
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    for _ in range(2):
        result = tiny_pipeline(PHOTO[:8, :8], output_type="np", color_fix=None).images
        assert 0 < np.abs(result - expected).max() < 0.2
        assert tiny_pipeline.unet.conv_in.weight.dtype == storage


def test_a_move_that_fails_halfway_is_undone(tiny_pipeline, monkeypatch):
    tensors = {id(p): p.data_ptr() for part in (tiny_pipeline.unet, tiny_pipeline.vae) for p in part.parameters()}
    expected = tiny_pipeline(PHOTO[:8, :8], output_type="np").images

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("no room")

    last = list(tiny_pipeline.components.values())[-1 if tiny_pipeline.tokenizer else 1]
    monkeypatch.setattr(last, "to", fail)
    with pytest.raises(torch.OutOfMemoryError):
        tiny_pipeline.to(torch.bfloat16)
    assert {id(p): p.data_ptr() for part in (tiny_pipeline.unet, tiny_pipeline.vae) for p in part.parameters()} == tensors
    assert tiny_pipeline.dtype == torch.float32
    assert np.array_equal(tiny_pipeline(PHOTO[:8, :8], output_type="np").images, expected)


def test_components_of_different_models_are_refused():
    pipe = build_tiny_pipeline()
    with pytest.raises(ValueError, match="width 8.*cross_attention_dim 16"):
        QArtSRPipeline(**{**pipe.components, "prompt_embedding": PromptEmbedding(4, 8)}, timestep=250)
    with pytest.raises(ValueError, match="v_prediction"):
        QArtSRPipeline(**{**pipe.components, "scheduler": DDPMScheduler(prediction_type="v_prediction")}, timestep=250)
    with pytest.raises(ValueError, match="`timestep` must be"):
        QArtSRPipeline(**pipe.components, timestep=1000)


@pytest.fixture
def float16_here(monkeypatch):
    """Computes in float16 on this processor, too, though slowly."""
    monkeypatch.setattr(overflow, "TOO_SLOW", set())


def overflowing(pipe):
    """The pipeline in float16, with a decoder that overflows in it: two factors cancel, but what is between them does not fit."""
    decoder = pipe.vae.decoder
    with torch.no_grad():
        decoder.conv_norm_out.weight.mul_(60000), decoder.conv_norm_out.bias.mul_(60000)
        decoder.conv_act = torch.nn.Identity()
        decoder.conv_out.weight.div_(60000)
    return pipe.to(torch.float16)


def decoded_in(pipe, monkeypatch):
    """The dtypes in which the decoder is run, as a list that grows."""
    dtypes, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **arguments: dtypes.append(z.dtype) or decode(z, **arguments))
    return dtypes


def test_overflow_in_float16_is_repaired_and_leaves_the_weights_as_they_were(tiny_pipeline, float16_here, caplog):
    pipe = overflowing(tiny_pipeline)
    expected = pipe.to(torch.float32)(photo(), tile_size=64, output_type="np", color_fix=None).images
    pipe.to(torch.float16)
    weights = [p for p in pipe.vae.parameters()]
    result = pipe(photo(), tile_size=64, output_type="np", color_fix=None).images
    assert expected.std() > 0.05 and np.abs(result - expected).max() < 0.05
    assert "float32" in caplog.text and "decode" in caplog.text
    assert all(p is w and p.dtype == torch.float16 for p, w in zip(pipe.vae.parameters(), weights, strict=True))


def test_an_overflow_is_remembered_from_call_to_call_and_said_once(tiny_pipeline, float16_here, caplog, monkeypatch):
    pipe = overflowing(tiny_pipeline)
    dtypes = decoded_in(pipe, monkeypatch)
    for _ in range(3):
        pipe(PHOTO[:8, :8], tile_size=64)
    assert dtypes == [torch.float16, torch.float32, torch.float32, torch.float32]
    assert caplog.text.count("overflowed in float16 and is run in float32 from here on") == 1


def test_a_component_in_the_place_of_one_that_overflowed_starts_afresh(tiny_pipeline, float16_here, caplog, monkeypatch):
    pipe = overflowing(tiny_pipeline)
    pipe(PHOTO[:8, :8], tile_size=64)
    pipe.vae = build_tiny_pipeline(seed=0).vae.to(torch.float16)
    dtypes = decoded_in(pipe, monkeypatch)
    pipe(PHOTO[:8, :8], tile_size=64)
    assert dtypes == [torch.float16] and caplog.text.count("overflowed") == 1


def test_damaged_weights_are_reported(tiny_pipeline):
    with torch.no_grad():
        tiny_pipeline.unet.conv_in.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="'unet'.*NaN.*Ways out"):
        tiny_pipeline(photo())


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloading_changes_nothing(tiny_pipeline, kind):
    expected = tiny_pipeline(photo(), tile_size=64, output_type="np").images
    if kind == "model":
        tiny_pipeline.enable_model_cpu_offload(device="cpu")
    else:
        for model in (tiny_pipeline.unet, tiny_pipeline.vae):
            cpu_offload(model, execution_device=torch.device("cpu"))  # weights exist only while their layer computes
    for _ in range(2):
        assert np.array_equal(tiny_pipeline(photo(), tile_size=64, output_type="np").images, expected)
