"""Split models, from a hub and from a web address."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from misbehaving import FakeHub, cut_after, left_over, pull

import irkit
from irkit import hub as models
from irkit.errors import PullError
from irkit.hub.registry import files

REPO = "org/Tiny-GGUF"
NAMES = [f"Tiny-F32-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
KEPT = [f"tiny-f32-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.fixture
def parts(hub: FakeHub, tmp_path: Path) -> list[bytes]:
    """What the hub serves as the parts of a model, in its folder F32, beside a whole one in Q4_K_M."""
    found = write_parts(tmp_path / "one", 0)
    put(hub, found)
    names = [f"F32/{name}" for name in NAMES] + ["Tiny-Q4_K_M.gguf"]
    listing = {"id": REPO, "modelId": REPO, "private": False, "tags": [], "siblings": [{"rfilename": n} for n in names]}
    hub.files[f"/api/models/{REPO}"] = json.dumps(listing).encode()
    hub.files[f"/{REPO}/resolve/main/Tiny-Q4_K_M.gguf"] = b"GGUF"
    return found


def write_parts(folder: Path, seed: int) -> list[bytes]:
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "Tiny-F32.gguf", "llama", split_max_tensors=1)
    for number in range(3):
        values = np.random.default_rng(number and seed + number).normal(size=(200, 256))
        writer.add_tensor(f"t{number}", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [(folder / name).read_bytes() for name in NAMES]


def put(hub: FakeHub, parts: list[bytes]) -> None:
    for name, content in zip(NAMES, parts, strict=True):
        hub.files[f"/{REPO}/resolve/main/F32/{name}"] = hub.files[f"/web/{name}"] = content


@pytest.mark.parametrize("asked", [":F32", f"/F32/{NAMES[0]}", f"/F32/{NAMES[2]}"])
def test_all_parts_come_whichever_is_named(hub: FakeHub, parts: list[bytes], asked: str) -> None:
    reports: list[str] = []
    made = models.pull(f"hf.co/{REPO}{asked}", progress=lambda done, total, what: reports.append(what))
    assert made.name == "tiny-f32"
    assert left_over() == KEPT
    assert [file.read_bytes() for file in files(made.path)] == parts
    assert made.size == sum(map(len, parts))
    with irkit.gguf.open(models.resolve("tiny-f32")) as file:
        assert len(file.tensors) == 3
    assert list(dict.fromkeys(reports)) == [f"tiny-f32 from 127.0.0.1, part {number} of 3" for number in (1, 2, 3)]
    models.remove("tiny-f32")
    assert left_over() == []


def test_without_a_quantization_the_usual_one_is_taken(hub: FakeHub, parts: list[bytes], model: bytes) -> None:
    hub.files[f"/{REPO}/resolve/main/Tiny-Q4_K_M.gguf"] = model
    assert models.pull(f"hf.co/{REPO}").name == "tiny-q4_k_m"


def test_a_broken_pull_keeps_the_parts_that_are_there(hub: FakeHub, parts: list[bytes]) -> None:
    address = f"{hub.url}/web/{NAMES[1]}"
    hub.script = [cut_after(len(parts[0])), cut_after(1000), *[cut_after(0)] * 4]
    with pytest.raises(PullError, match="given up"):
        pull(address)
    assert models.models() == []
    hub.script = []
    asked = len(hub.seen)
    assert [file.read_bytes() for file in files(pull(address).path)] == parts
    assert [(path, headers.get("Range")) for _, path, headers in hub.seen[asked:]] == [
        (f"/web/{NAMES[1]}", "bytes=1000-"),
        (f"/web/{NAMES[2]}", None),
    ]
    assert left_over() == KEPT


def test_a_missing_part_is_an_error(hub: FakeHub, parts: list[bytes]) -> None:
    del hub.files[f"/web/{NAMES[2]}"]
    with pytest.raises(PullError, match=rf"no such file: /web/{NAMES[2]}"):
        pull(f"{hub.url}/web/{NAMES[0]}")
    assert models.models() == []


def test_parts_of_another_model_are_refused(hub: FakeHub, parts: list[bytes]) -> None:
    hub.files[f"/web/{NAMES[2]}"] = parts[1]
    with pytest.raises(PullError, match=r"no model: .*is not part 3 of 3"):
        pull(f"{hub.url}/web/{NAMES[0]}")
    assert left_over() == []


def test_a_model_whose_parts_changed_is_fetched_anew_and_a_copy_keeps_the_old(
    hub: FakeHub, parts: list[bytes], tmp_path: Path
) -> None:
    address = f"{hub.url}/web/{NAMES[0]}"
    old = pull(address)
    models.copy("tiny-f32", "copy")
    newer = write_parts(tmp_path / "two", 7)
    assert newer[0] == parts[0]
    put(hub, newer)
    new = pull(address)
    assert [file.read_bytes() for file in files(new.path)] == newer
    assert [file.read_bytes() for file in files(old.path)] == parts
    models.remove("copy")
    assert [file.read_bytes() for file in files(new.path)] == newer
    assert not old.path.exists()
    models.remove("tiny-f32")
    assert left_over() == []
