import dataclasses
import hashlib
import json
import re
import subprocess
import sys
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving import write_gguf

from irkit import hub
from irkit.errors import IrkitError, ModelFileError, ModelNotFoundError, OptionError
from irkit.hub import registry


def test_add_describes_a_file_and_leaves_it_where_it_is(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "My Model.Q4 (v2).gguf", file_type=15)
    manifest = hub.add(file)
    assert manifest == hub.Manifest(
        name="my-model.q4-v2",
        path=file,
        size=file.stat().st_size,
        architecture="llama",
        parameters=2 * 64 * 256,
        quantization="Q4_K_M",
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        added_at=manifest.added_at,
        source=None,
    )
    assert abs(datetime.now(UTC) - manifest.added_at) < timedelta(minutes=1)
    assert hub.find("my-model.q4-v2") == hub.find("My-Model.Q4-v2") == manifest
    assert hub.models() == [manifest]
    assert hub.resolve("my-model.q4-v2") == file
    assert not (hub.home() / "models").exists()
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.name = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_manifest_on_disk_is_json_with_a_utc_date(tmp_path: Path) -> None:
    hub.add(write_gguf(tmp_path / "m.gguf"), "tagged:v1")
    stored = json.loads((hub.home() / "manifests" / "tagged@v1.json").read_text())
    assert stored.keys() == {field.name for field in dataclasses.fields(hub.Manifest)}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", stored["added_at"])
    assert hub.resolve("tagged:v1") == tmp_path / "m.gguf"


def test_the_real_model_is_described(model_path: Path) -> None:
    manifest = hub.add(model_path, "real")
    assert (manifest.architecture, manifest.quantization, manifest.parameters) == ("llama", "Q4_1", 134515008)
    assert (manifest.size, manifest.sha256) == (hub.CATALOG["smollm2"].size, hub.CATALOG["smollm2"].sha256)


def test_file_types_are_those_of_the_gguf_package() -> None:
    numbering = {
        member.value: member.name.removeprefix("MOSTLY_").removeprefix("ALL_")
        for member in gguf.LlamaFileType
        if member is not gguf.LlamaFileType.GUESSED
    }
    known_to_both = numbering.keys() & registry.FILE_TYPES.keys()
    assert {number: registry.FILE_TYPES[number] for number in known_to_both} == {
        number: numbering[number] for number in known_to_both
    }
    assert len(known_to_both) >= 30


@pytest.mark.parametrize(("file_type", "label"), [(1024 + 7, "Q8_0"), (None, "F32"), (999, "F32")])
def test_quantization_of_a_guessed_a_missing_and_an_unknown_file_type(
    tmp_path: Path, file_type: int | None, label: str
) -> None:
    # F32 takes more bytes than F16 in this file.
    assert hub.add(write_gguf(tmp_path / "m.gguf", file_type=file_type)).quantization == label


def test_a_name_belongs_to_one_file(tmp_path: Path) -> None:
    first, second = write_gguf(tmp_path / "one.gguf"), write_gguf(tmp_path / "two.gguf", seed=1)
    hub.add(first, "name")
    with pytest.raises(OptionError, match=r"name name belongs to .*one\.gguf"):
        hub.add(second, "name")
    again = hub.add(first, "name")
    hub.add(first, "second-name")
    assert [manifest.name for manifest in hub.models()] == ["name", "second-name"]
    assert hub.find("name") == again
    first.unlink()
    assert hub.add(second, "name").path == second


def test_add_refuses_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file at .*missing\.gguf"):
        hub.add(tmp_path / "missing.gguf")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(write_gguf(tmp_path / "m.gguf").read_bytes()[:1000])
    with pytest.raises(ModelFileError):
        hub.add(damaged)
    unnamed = write_gguf(tmp_path / "モデル.gguf")
    with pytest.raises(OptionError, match="cannot be a model's name"):
        hub.add(unnamed)
    assert hub.models() == []
    assert hub.add(unnamed, "model").path == unnamed


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"general.architecture", b"general.architectura"))
    with pytest.raises(ModelFileError, match=r"general\.architecture"):
        hub.add(tmp_path / "m.gguf")


def test_remove_deletes_only_what_irkit_fetched_and_nobody_uses(tmp_path: Path) -> None:
    elsewhere = write_gguf(tmp_path / "mine.gguf")
    hub.add(elsewhere)
    hub.remove("mine")
    assert elsewhere.is_file()

    (hub.home() / "models").mkdir()
    fetched = write_gguf(hub.home() / "models" / "fetched.gguf")
    hub.add(fetched, "one")
    hub.add(fetched, "two")
    hub.remove("one")
    assert fetched.is_file()
    hub.remove("TWO")
    assert not fetched.exists()
    assert hub.models() == []
    with pytest.raises(ModelNotFoundError):
        hub.remove("two")


def test_remove_does_not_follow_paths_out_of_the_models_folder(tmp_path: Path) -> None:
    outside = write_gguf(tmp_path / "outside.gguf")
    models = hub.home() / "models"
    models.mkdir(parents=True)
    (models / "link.gguf").symlink_to(outside)
    for name, path in (("link", models / "link.gguf"), ("dots", models / ".." / ".." / "outside.gguf")):
        manifest = dataclasses.replace(hub.add(outside, name), path=path)
        stored = registry._JSON.dump_json(manifest)
        (hub.home() / "manifests" / f"{name}.json").write_bytes(stored)
        hub.remove(name)
        assert outside.is_file()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "broken"}', "\xff", "null"])
def test_a_damaged_manifest_is_skipped_with_one_warning(tmp_path: Path, content: str) -> None:
    good = hub.add(write_gguf(tmp_path / "good.gguf"))
    (hub.home() / "manifests" / "broken.json").write_text(content, encoding="latin-1")
    with pytest.warns(UserWarning, match=r"broken\.json is damaged") as caught:
        assert hub.models() == [good]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="damaged"):
        hub.remove("broken")
    assert hub.models() == [good]


def test_a_manifest_under_another_models_name_is_damaged(tmp_path: Path) -> None:
    good = hub.add(write_gguf(tmp_path / "good.gguf"))
    manifests = hub.home() / "manifests"
    (manifests / "copy.json").write_bytes((manifests / "good.json").read_bytes())
    with pytest.warns(UserWarning, match=r"copy\.json is damaged .* it names 'good'"):
        assert hub.models() == [good]


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../up", "a/b/c", "a\\b", "/etc/passwd", "a\0b", "a\n", "a b", "-a", ".a", ":a", "a:"),
        *("a:b:c", "con", "nul.txt", "com1", "lpt9:x", "x" * 129, "é", "x.gguf", "a@b", "C:\\x", "a:../b"),
        *("a.b/c", "a/../b", "/a", "a/", "a//b", "localhost/a", "hf.co/a", "hf.co/../a", "A:B/c"),
    ],
)
def test_bad_names_are_refused(tmp_path: Path, name: str) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    for use in (lambda: hub.add(file, name), lambda: hub.find(name), lambda: hub.remove(name)):
        with pytest.raises(OptionError, match="model's name") as caught:
            use()
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
    assert not (hub.home() / "manifests").exists()


@given(st.text(max_size=200) | st.text(alphabet="ab.:-_/\\C1", max_size=12))
def test_an_accepted_name_stays_inside_the_folders(name: str) -> None:
    try:
        accepted = registry.check_name(name)
    except OptionError:
        return
    blob = registry.blob_path(accepted)
    assert blob.parent == hub.home() / "models"
    assert blob.resolve() == blob.parent.resolve() / blob.name
    assert not set(blob.name) & set('<>:"/\\|?*')


@given(st.text(max_size=300))
def test_any_lookup_ends_in_a_path_or_an_irkit_error(text: str) -> None:
    with pytest.raises((ModelNotFoundError, OptionError)):
        hub.resolve(text)


def test_resolve_takes_paths_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = write_gguf(tmp_path / "registered.gguf")
    hub.add(registered, "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert hub.resolve("model") == registered
    here = write_gguf(Path("model"))
    assert hub.resolve("model") == here
    assert hub.resolve(Path("model")) == here
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/registered.gguf") == registered


def test_a_miss_says_what_was_looked_up_where_and_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file at '\./smollm2'"):
        hub.resolve("./smollm2")
    with pytest.raises(ModelNotFoundError, match=r"no file at 'smollm2\.gguf'"):
        hub.resolve("smollm2.gguf")
    with pytest.raises(ModelNotFoundError, match="no file at 'smollm2'"):
        hub.resolve(Path("smollm2"))
    file = write_gguf(tmp_path / "m.gguf")
    hub.add(file, "tinyllama")
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve("TinyLama")
    message = str(caught.value)
    assert "'TinyLama'" in message
    assert str(Path.cwd()) in message
    assert str(hub.home() / "manifests") in message
    assert message.endswith("did you mean tinyllama?")
    with pytest.raises(ModelNotFoundError, match="did you mean smollm2"):
        hub.resolve("smolm2")
    file.unlink()
    with pytest.raises(ModelNotFoundError, match=r"tinyllama is registered, but its file .*m\.gguf is gone"):
        hub.resolve("tinyllama")


def test_home_is_the_environments_or_the_platforms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.home() == tmp_path / "home"
    monkeypatch.delenv("IRKIT_HOME")
    assert hub.home().is_absolute()
    assert "irkit" in hub.home().parts


def test_a_registry_that_cannot_be_written_is_an_irkit_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(IrkitError, match="cannot be changed"):
        hub.add(write_gguf(tmp_path / "m.gguf"))
    assert hub.models() == []


_CHURN = """
import sys
from irkit import hub
from irkit.errors import ModelNotFoundError

me, mine, shared = sys.argv[1:]
hub.add(mine, f"kept-{me}")
for _ in range(30):
    hub.add(shared, "shared")
    assert all(manifest.size for manifest in hub.models())
    try:
        hub.remove("shared")
    except ModelNotFoundError:
        pass
hub.add(shared, "shared")
"""


def test_processes_may_share_a_registry(tmp_path: Path) -> None:
    shared = write_gguf(tmp_path / "shared.gguf")
    files = [write_gguf(tmp_path / f"{index}.gguf", seed=index) for index in range(3)]
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", _CHURN, str(index), str(file), str(shared)])
        for index, file in enumerate(files)
    ]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [manifest.name for manifest in hub.models()] == ["kept-0", "kept-1", "kept-2", "shared"]
    assert {path.suffix for path in (hub.home() / "manifests").iterdir()} <= {".json", ""}


def test_importing_the_hub_loads_no_http_client() -> None:
    code = "import sys, irkit.hub; print({'httpx', 'huggingface_hub', 'jax', 'requests'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
