"""Changes of a checkpoint folder, as damage, other tools, and people who mean harm would make them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qartsr_pipeline.checkpoint_files import CHECKSUMS_NAME, write_checksums

W = "diffusion_pytorch_model.safetensors"
JUNK: list[Any] = [
    None, True, False, -1, 0, 1, 7, 10**6, 10**30, -0.0, 1.5, 1e300, "", "8", "none", "../x", "\ud83d\ude00" * 3, [], [0],
    {}, {"a": []},
    [[1, [2, [3]]]], "os", "Linear", 2**31, [10**9] * 4, "x" * 5000,
]  # fmt: skip
# A mutation returns what it did, and how much an image may differ: None if the change could not be noticed by any means.
Mutation = tuple[str, float | None]


def sums(rng: random.Random, folder: Path, *choices: str) -> str:
    """Leaves the folder's sums as they are, renews or removes them."""
    choice = rng.choice(choices or ("kept", "renewed", "removed"))
    if choice == "renewed":
        write_checksums(folder)
    elif choice == "removed":
        (folder / CHECKSUMS_NAME).unlink()
    return f"sums {choice}"


def some_file(rng: random.Random, folder: Path, *patterns: str) -> Path:
    return rng.choice(sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()))


def places_in(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of all values in JSON content."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(found for key, each in items for found in places_in(each, (*path, key)))]


def edit(rng: random.Random, content: Any) -> str:
    """Changes one place of JSON content."""
    path = rng.choice(places_in(content))
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    key, operation = path[-1], rng.choice(["remove", "junk", "junk", "list", "swap", "add"])
    if operation == "remove":
        del parent[key]
    elif operation == "junk":
        parent[key] = rng.choice(JUNK)
    elif operation == "list":
        parent[key] = [parent[key]]
    elif operation == "swap":
        other = rng.choice(places_in(content))
        value = content
        for step in other:
            value = value[step]
        parent[key] = json.loads(json.dumps(value))
    elif isinstance(parent, dict):
        parent["zzz"] = rng.choice(JUNK)
    else:
        parent.append(rng.choice(JUNK))
    return f"{operation} {path}"


def mutate_json(rng: random.Random, folder: Path) -> Mutation:
    path = some_file(rng, folder, "*.json", "[!t]*/*.json", "text_encoder/*.json")
    content = json.loads(path.read_text())
    done = edit(rng, content)
    path.write_text(json.dumps(content))
    kept = sums(rng, folder) if path.name != CHECKSUMS_NAME else "sums edited"
    return f"{path.relative_to(folder)}: {done}, {kept}", 1e-4 if kept in ("sums kept", "sums edited") else None


def mutate_json_text(rng: random.Random, folder: Path) -> Mutation:
    path = some_file(rng, folder, "*.json", "*/*.json")
    text = path.read_bytes()
    name, change = rng.choice(
        [
            ("deep", b"[" * 5000 + b"]" * 5000),
            ("deep object", b'{"a":' * 2000 + b"1" + b"}" * 2000),
            ("cut", text[: rng.randrange(len(text))]),
            ("empty", b""),
            ("zeros", b"\0" * len(text)),
            ("UTF-16", text.decode().encode("utf-16")),
            ("BOM", b"\xef\xbb\xbf" + text),
            ("not UTF-8", text[:-2] + b"\xff\xfe" + text[-2:]),
            ("NaN", text.rstrip()[:-1] + b', "zzz": NaN}'),
            ("digits", text.rstrip()[:-1] + b', "zzz": ' + b"9" * 6000 + b"}"),
            ("a key twice", text.rstrip()[:-1] + b', "_class_name": "A", "_class_name": "A"}'),
            ("long", text + b" " * 20_000_000),
            ("array", b"[" + text + b"]"),
            ("random", rng.randbytes(200)),
        ]
    )
    path.write_bytes(change)
    kept = sums(rng, folder, "kept", "renewed", "removed") if path.name != CHECKSUMS_NAME else "sums edited"
    return f"{path.relative_to(folder)}: {name}, {kept}", 1e-4


def mutate_tensors(rng: random.Random, folder: Path) -> Mutation:
    """Tensors that are missing, left over, or not what the configuration asks for."""
    path = some_file(rng, folder, "*/*.safetensors")
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    tolerance = 1e-4
    done = rng.choice(["drop", "drop many", "rename", "upper", "flat", "none", "cast", "extra", "transpose", "alias"])
    if done == "drop":
        del tensors[name]
    elif done == "drop many":
        tensors = {key: value for key, value in tensors.items() if rng.random() < 0.5}
    elif done in ("rename", "upper"):
        tensors[name.upper() if done == "upper" else f"{name}_"] = tensors.pop(name)
    elif done == "flat":
        tensors[name] = torch.cat([tensor.flatten(), tensor.flatten()[:1]])
    elif done == "none":
        tensors[name] = tensor.flatten()[:0]
    elif done == "cast":
        kind = rng.choice([torch.int32, torch.float16, torch.float64, torch.bool, torch.uint8])
        done, tolerance, tensors[name] = f"cast to {kind}", 0.05 if kind is torch.float16 else 1e-4, tensor.to(kind)
        if kind in (torch.float64, torch.uint8) and tensor.dtype == kind:
            done = "nothing"
    elif done == "extra":
        tensors["model.weight_packed"] = torch.zeros(3)
    elif done == "transpose" and tensor.dim() > 1 and tensor.shape[0] != tensor.shape[1]:
        tensors[name] = tensor.transpose(0, 1).contiguous()
    elif done == "alias":
        others = [key for key in sorted(tensors) if tensors[key].shape != tensor.shape]
        tensors[name] = tensors[rng.choice(others)].clone() if others else tensor[None].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{path.relative_to(folder)}: {done} {name}, {sums(rng, folder)}", tolerance


def mutate_header(rng: random.Random, folder: Path) -> Mutation:
    """Headers that lie, in files of the size that they had, or of the size that they claim."""
    path = some_file(rng, folder, "*/*.safetensors")
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([key for key in sorted(header) if key != "__metadata__"])
    entry = header[name]
    claimed = None
    lies = ["dtype", "shape", "offset", "metadata", "hole", "overlap", "100 GB", "length", "twice", "edit", "pad", "rename"]
    done = rng.choice(lies)
    if done == "dtype":
        entry["dtype"] = rng.choice(["F32", "F16", "F8", "", 7, None, "I64", "U8"])
    elif done == "shape":
        entry["shape"] = rng.choice([[0], [-1], [2**62, 4], [1.0], "3", entry["shape"][::-1], [*entry["shape"], 1], [10**9]])
    elif done == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice([-1, 0, 10**12, 1.5, "0", None, entry["data_offsets"][0] + 1])
    elif done == "metadata":
        header["__metadata__"] = rng.choice([7, {"format": 1}, [], {"a": {}}, "pt"])
    elif done == "hole":
        for other in header.values():
            if "data_offsets" in other and other["data_offsets"][0] >= entry["data_offsets"][1]:
                other["data_offsets"] = [offset + 8 for offset in other["data_offsets"]]
        data += b"\0" * 8
    elif done == "overlap":
        header["zzz"] = dict(entry)
    elif done == "100 GB":
        last = max((e for key, e in header.items() if key != "__metadata__"), key=lambda e: e["data_offsets"][1])
        start, claimed = last["data_offsets"][0], 100_000_000_000
        last.update(dtype="U8", shape=[claimed - start], data_offsets=[start, claimed])
    elif done == "edit":
        edit(rng, header)
    elif done == "rename":
        header[f"{name}x"] = header.pop(name)
    text = json.dumps(header).encode()
    if done == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}".encode() + b"}"
    size = len(text) if done != "length" else rng.choice([0, 1, len(text) - 1, len(text) + 1, 10**8, 2**63])
    path.write_bytes(size.to_bytes(8, "little") + text + data + (b"\0" * 64 if done == "pad" else b""))
    if claimed:
        os.truncate(path, 8 + len(text) + claimed)
    kept = sums(rng, folder, "kept", "removed")
    return f"{path.relative_to(folder)}: header, {done} of {name}, {kept}", 1e-4


def flip_byte(rng: random.Random, folder: Path) -> Mutation:
    path = some_file(rng, folder, "*.json", "*/*.json", "*/*.txt", "*/*.safetensors", "*/*.safetensors")
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.relative_to(folder)}: a bit of byte {place}", 1e-4


def exchange_files(rng: random.Random, folder: Path) -> Mutation:
    """Files that are no files, that are elsewhere, or that hold something else."""
    path = some_file(rng, folder, "*.json", "*/*.json", "*/*.safetensors", "*/*.safetensors")
    done = rng.choice(list(EXCHANGES))
    EXCHANGES[done](path)
    if done in ("sparse", "pipe", "zeros without end", "variant and .bin", ".bin instead"):
        kept = "sums kept" if path.name == CHECKSUMS_NAME or rng.random() < 0.5 else sums(rng, folder, "removed")
    else:
        kept = "sums kept" if not (folder / CHECKSUMS_NAME).is_file() else sums(rng, folder, "kept", "removed")
    return f"{path.relative_to(folder)}: {done}, {kept}", 1e-4


class Bomb:
    """A pickle that leaves a file when it is opened."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder / "executed"),)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _sparse(path: Path) -> None:
    os.truncate(path, 100_000_000_000)


def _bin_instead(path: Path) -> None:
    tensors = load_file(path) if path.suffix == ".safetensors" else {}
    torch.save({key: value * 0 for key, value in tensors.items()}, path.with_name(path.stem + ".bin"))
    path.unlink()


def _variant_and_bin(path: Path) -> None:
    copy = path.with_name(f"{path.stem}.fp16{path.suffix}")
    shutil.copy(path, copy)
    _bin_instead(path)


def _listing(path: Path, part: object) -> None:
    names = list(load_file(path)) if path.suffix == ".safetensors" else ["a"]
    listing = {"metadata": {}, "weight_map": dict.fromkeys(names, part)}
    path.with_name(f"{W}.index.json").write_text(json.dumps(listing))


_CODE = "import os; os.mkdir(os.environ.get('FUZZ_EXECUTED', 'executed'))"
EXCHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "pipe": lambda path: _replace(path, os.mkfifo),
    "folder": lambda path: _replace(path, Path.mkdir),
    "link to nowhere": lambda path: _replace(path, lambda p: p.symlink_to("nowhere")),
    "link to itself": lambda path: _replace(path, lambda p: p.symlink_to(p.name)),
    "zeros without end": lambda path: _replace(path, lambda p: p.symlink_to("/dev/zero")),
    "sparse": _sparse,
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb(path.parent.parent))),
    ".bin instead": _bin_instead,
    "variant and .bin": _variant_and_bin,
    "stale listing": lambda path: _listing(path, f"{path.stem}-00001-of-00002.safetensors"),
    "listing of a .bin": lambda path: _listing(path, "a.bin"),
    "listing of another folder": lambda path: _listing(path, f"../vae/{W}"),
    "listing of numbers": lambda path: _listing(path, 7),
    "code": lambda path: path.with_name("component.py").write_text(_CODE),
    "code of None": lambda path: path.with_name("None.py").write_text(_CODE),
}


def mutate_scheme(rng: random.Random, folder: Path) -> Mutation:
    """Entries of quantization_config that do not belong to the weights."""
    path = folder / rng.choice(["unet", "vae"]) / "config.json"
    config = json.loads(path.read_text())
    scheme = config["quantization_config"]
    pair = rng.choice(scheme["overrides"])
    layer = rng.choice([scheme["default"], *(each[1] for each in scheme["overrides"] if each[1])])
    edits = ["bits", "rank", "order", "pattern", "null", "empty", "folding", "edit", "method", "version", "list", "twice"]
    done = rng.choice(edits)
    if done == "bits":
        layer[rng.choice(["weight_bits", "activation_bits"])] = rng.choice([0, 1, 2, 5, 8, 16, 4.0, True, "4", None, [4], 2**40])
    elif done == "rank":
        layer["rank"] = rng.choice([-1, 0, 1, 3, True, 1.5, "8", None, 10**30])
    elif done == "order":
        rng.shuffle(scheme["overrides"])
    elif done == "pattern":
        pair[0] = rng.choice([7, None, "", "*", "[", "conv_in", ["a"], "(" * 500])
    elif done == "null":
        pair[1] = None
    elif done == "empty":
        config["quantization_config"] = rng.choice([{}, [], False, 0, "qartsr", None])
    elif done == "folding":
        values = {"timestep": rng.choice([250, 100, -1, None, "250", 1.5]), "tokens": rng.choice([4, 7, 0, -1, None, 10**12])}
        scheme["folding"] = rng.choice([values, {**values, "zzz": 1}, None, {}, [], {"timestep": 250}])
    elif done == "edit":
        done = edit(rng, scheme)
    elif done == "method":
        scheme["quant_method"] = rng.choice(["quanto", "gguf", "", None, 7, ["qartsr"], "QARTSR"])
    elif done == "version":
        scheme["format_version"] = rng.choice([0, 2, 99, "1", None, True, 1.0, 10**40])
    elif done == "list":
        scheme["overrides"] = rng.choice([{}, dict(scheme["overrides"]), "abc", 7, [[]], [["a"]], [["a", {}, 1]]])
    elif done == "twice":
        scheme["overrides"].append(list(pair))
    path.write_text(json.dumps(config))
    return f"{path.relative_to(folder)}: scheme, {done}, {sums(rng, folder)}", 1e-4


MUTATIONS = (mutate_json, mutate_json, mutate_json_text, mutate_tensors, mutate_header, flip_byte, exchange_files)
