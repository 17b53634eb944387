"""When a prompt is taken, and what is said when it is not."""

import pytest
from PIL import Image

from qartsr_pipeline.convert.conversion import convert_diffusers
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.fold import fold

PICTURE = Image.new("RGB", (8, 8), "orange")


@pytest.fixture
def pipeline(made, tmp_path):
    convert_diffusers(made.base, tmp_path / "out", None)
    return QArtSRPipeline.from_pretrained(tmp_path / "out")


def test_a_folded_model_takes_none(pipeline):
    fold(pipeline.unet, 999, pipeline.prompt_embedding(1))
    pipeline(PICTURE)
    with pytest.raises(ValueError, match="`prompt` has no effect.*folded.*Leave `prompt` out"):
        pipeline(PICTURE, prompt="a")


def test_a_prompt_is_one_string(pipeline):
    with pytest.raises(TypeError, match="`prompt` must be a string.*list"):
        pipeline(PICTURE, prompt=["a", "b"])
    with pytest.raises(ValueError, match="`prompt` holds half of a character.*Pass text"):
        pipeline(PICTURE, prompt="a\ud800")


def test_without_text_encoder_or_tokenizer(pipeline, tmp_path):
    text_encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    bare = QArtSRPipeline.from_pretrained(tmp_path / "out", text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="`prompt` needs a text encoder and a tokenizer.*from_pretrained"):
        bare(PICTURE, prompt="a")
    given = QArtSRPipeline(**{**bare.components, "text_encoder": text_encoder, "tokenizer": tokenizer})
    assert given(PICTURE, prompt="a b").images[0] == pipeline(PICTURE, prompt="a b").images[0]


def test_saving_and_offloading_keep_prompts(pipeline, tmp_path):
    expected = pipeline(PICTURE, prompt="a b").images[0]
    pipeline.save_pretrained(tmp_path / "again")
    again = QArtSRPipeline.from_pretrained(tmp_path / "again")
    again.enable_model_cpu_offload(device="cpu")
    assert again(PICTURE, prompt="a b").images[0] == expected
