"""docs/checkpoint-format.md, followed to the letter by a reader that shares no code with ours."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from xxhash import xxh3_64_hexdigest

from tests.helpers.checkpoints import random_native, tiny_model
from workbench.spec.layout import ParallelLayout

PRIME, WORD = 2**33 - 9, 2**64
PAGE = Path(__file__).parents[2] / "docs" / "checkpoint-format.md"


def mix(index: int, stream: int) -> int:
    z = (index * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def page_fingerprint(array: np.ndarray, dtype: str) -> str:
    rows = array.reshape(-1, array.shape[-1]).view("<u4").tolist()
    sums = []
    for stream in range(3):
        total = 0
        for r, row in enumerate(rows):
            word_weights = [((mix(c % 256, stream) >> 51) | 1) for c in range(len(row))]
            block_weights = [((mix(c // 256, 4096 + stream) >> 44) | 1) for c in range(len(row))]
            row_sum = sum(x * w * b for x, w, b in zip(row, word_weights, block_weights, strict=True))
            total += row_sum * ((mix(r, 8192 + stream) >> 34) | 1)
        sums.append(total % PRIME)
    return hashlib.blake2s(f"{dtype} {list(array.shape)} {sums}".encode(), digest_size=16).hexdigest()


def test_a_reader_made_from_the_page_alone_finds_every_tensor_box_checksum_and_fingerprint(tmp_path):
    path = tmp_path / "step-00000100"
    source = random_native(path, tiny_model(num_hidden_layers=2), ParallelLayout(tp=4, pp=2), dtype="F16")
    text = (path / "manifest.json").read_bytes()
    manifest = json.loads(text)
    assert manifest["format"] == "workbench-checkpoint" and manifest["version"] == 2
    written = re.search(rb'"manifest_checksum": "([0-9a-f]{16})"', text)
    assert written is not None and text.index(b"workbench-checkpoint") < 200
    zeroed = text.replace(written[1], b"0" * 16, 1)
    assert xxh3_64_hexdigest(zeroed) == written[1].decode()
    files = {name: (load_file(path / name), (path / name).read_bytes()) for name in manifest["files"]}
    assert set(manifest["tensors"]) == set(source.arrays)
    for name, tensor in manifest["tensors"].items():
        array = np.zeros(tensor["shape"], {"F16": np.float16, "F32": np.float32}[tensor["dtype"]])
        for offset, size, file, start, num_bytes, checksum in tensor["boxes"]:
            by_key, content = files[file]
            key = name if size == tensor["shape"] else f"{name}@{','.join(map(str, offset))}"
            array[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] = by_key[key]
            assert xxh3_64_hexdigest(content[start : start + num_bytes]) == checksum
            assert content[start : start + num_bytes] == by_key[key].tobytes()
        assert np.array_equal(array, source.arrays[name])
        assert page_fingerprint(array, tensor["dtype"]) == tensor["fingerprint"]


def test_the_page_names_every_key_of_a_manifest(tmp_path):
    random_native(tmp_path / "a", tiny_model(num_hidden_layers=1), optimizer=False)
    page = PAGE.read_text()
    for key in json.loads((tmp_path / "a" / "manifest.json").read_text()):
        assert f"| `{key}` |" in page, key
