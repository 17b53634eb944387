"""Everything but text encoders works where transformers is not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    """The code's output, as if transformers were not installed, nor peft, which does not exist without it."""
    hidden = "import sys\nsys.modules |= dict.fromkeys(['transformers', 'peft'])\n"
    done = subprocess.run([sys.executable, "-c", hidden + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_commands_quantize_enlarge_and_measure(tiny_folder, tmp_path):
    photographs, quantized, enlarged = tmp_path / "photographs", tmp_path / "w4a4", tmp_path / "x4.png"
    photographs.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photographs / "a.png")
    method = ["--recipe", "maxmin", "--bits", "w4a4", "--evaluate", str(photographs)]
    method += ["--set", "images=2", "image_size=32", "cached_batches=1"]
    commands = [
        ["quantize", str(tiny_folder), "--output", str(quantized), *method],
        ["upscale", str(photographs / "a.png"), "-o", str(enlarged), "--model", str(quantized / "model")],
        ["evaluate", str(tiny_folder), str(quantized / "model"), "--data", str(photographs)],
    ]
    run(f"from qartsr_pipeline.cli.main import main\nfor command in {commands}:\n    assert main(command) == 0, command")
    assert Image.open(enlarged).size == (256, 256)


def test_the_nodes_work():
    tests = "tests/comfy_nodes/test_upscale.py::test_nodes_of_others_take_the_model"
    run(f"import pytest\nsys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {tests!r}]))")


def test_a_text_encoder_is_refused_and_can_be_left_out(tiny_folder):
    index = json.loads((tiny_folder / "model_index.json").read_text(encoding="utf-8"))
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (tiny_folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    for name in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "tokenizer/tokenizer.json"):
        (tiny_folder / name).parent.mkdir(exist_ok=True)
        (tiny_folder / name).write_text("{}", encoding="utf-8")
    (tiny_folder / "checksums.json").unlink()
    save_file({"weight": np.zeros(1, np.float32)}, tiny_folder / "text_encoder" / "model.safetensors")
    said = run(f"""
from qartsr_pipeline import CheckpointError, QArtSRPipeline
QArtSRPipeline.from_pretrained({str(tiny_folder)!r}, text_encoder=None, tokenizer=None)
try:
    QArtSRPipeline.from_pretrained({str(tiny_folder)!r})
except CheckpointError as error:
    print(error)
""")
    assert "text_encoder in " in said and "pip install 'qartsr[prompt]'" in said and "text_encoder=None, tokenizer=None" in said
