"""Models made from others, with a template, a system prompt and options of their own."""

import hashlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from misbehaving import write_gguf

from irkit import hub
from irkit.errors import ModelFileError, ModelNotFoundError, OptionError, PullError
from irkit.hub import registry

TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "m.gguf")


def test_a_model_is_made_of_a_file(file: Path) -> None:
    made = hub.create("Pirate:v1", file, template=TEMPLATE, system="Be a pirate.", options={"temperature": "0.5"})
    assert hub.find("pirate:v1") == made
    assert (made.path, made.template, made.system) == (file, TEMPLATE, "Be a pirate.")
    assert made.options == {"temperature": 0.5}
    hub.remove("pirate:v1")
    assert file.is_file()


def test_a_model_is_made_of_another_and_keeps_what_is_not_changed(file: Path) -> None:
    hub.create("one", file, template=TEMPLATE, system="One.", options={"top_k": 3, "num_ctx": 64}, license="MIT")
    made = hub.create("two", "one", system="Two.", options={"top_k": 5, "stop": ["\n"]})
    assert (made.system, made.template, made.license) == ("Two.", TEMPLATE, "MIT")
    assert made.options == {"top_k": 5, "num_ctx": 64, "stop": ["\n"]}
    one = hub.find("one")
    assert one is not None
    assert one.system == "One."
    assert hub.create("three", one).options == one.options


def test_a_name_is_made_anew_but_a_fetched_file_is_not_lost(file: Path, tmp_path: Path) -> None:
    hub.create("name", file)
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    assert hub.create("name", other).path == other
    (hub.home() / "models").mkdir()
    fetched = registry.publish([write_gguf(tmp_path / "partial")], "fetched", ["0" * 64], "source")
    with pytest.raises(OptionError, match="fetched is a model that was fetched: give another name"):
        hub.create("fetched", file)
    assert hub.create("fetched", "fetched", system="Hm.").source == "source"
    hub.copy("fetched", "copy")
    assert hub.create("fetched", file).path == file
    hub.remove("copy")
    assert not fetched.path.exists()


def test_a_copy_shares_the_file(tmp_path: Path) -> None:
    (hub.home() / "models").mkdir(parents=True)
    first = registry.publish([write_gguf(tmp_path / "partial")], "one", ["0" * 64], "source")
    assert hub.copy("ONE", "Two").path == first.path
    hub.remove("one")
    assert hub.resolve("two") == first.path
    with pytest.raises(ModelNotFoundError, match="no model 'one'"):
        hub.copy("one", "three")
    with pytest.raises(OptionError, match="cannot be a model's name"):
        hub.copy("two", "../three")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"options": {"temprature": 1}}, "temprature.*did you mean temperature"),
        ({"options": {"temperature": "hot"}}, "temperature"),
        ({"options": {"num_ctx": 1}}, "num_ctx"),
        ({"template": "{% if %}"}, "template cannot be read"),
        ({"name": "a/b/c"}, "cannot be a model's name"),
    ],
)
def test_what_cannot_be_made_is_said_and_changes_nothing(file: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        hub.create(**{"name": "name", "source": file} | given)  # pyright: ignore[reportArgumentType]
    assert hub.models() == []


def test_a_source_that_is_not_there_or_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.create("name", "no-such-model")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError):
        hub.create("name", tmp_path / "x.gguf")


def test_what_only_ollama_has_is_left_out_with_a_warning(file: Path) -> None:
    with pytest.warns(UserWarning, match="left out: mirostat, num_gpu"):
        made = hub.create("name", file, options={"mirostat": 1, "num_gpu": 99, "top_p": 0.5})
    assert made.options == {"top_p": 0.5}


def test_a_go_template_beyond_us_is_left_out_with_a_warning(file: Path) -> None:
    with pytest.warns(UserWarning, match="a Go one, cannot be read here; the model file's own is used"):
        assert hub.create("name", file, template="{{ range .Tools }}{{ . }}{{ end }}").template is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = hub.create("name", file, template="{{ .System }} {{ .Prompt }}")
    assert made.template is not None
    assert "{%" in made.template


def test_a_blob_is_whole_or_not_there(file: Path) -> None:
    content = file.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert hub.blob(digest) is None
    with pytest.raises(TypeError), hub.blob_writer(digest) as write:
        write("no bytes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="have the sha256"), hub.blob_writer(digest) as write:
        write(content[:100])
    with pytest.raises(PullError, match="MB are needed"), hub.blob_writer(digest, 1 << 60):
        pass
    assert hub.blob(digest) is None
    with hub.blob_writer(digest, len(content)) as write:
        write(content[:100])
        write(content[100:])
    blob = hub.blob(digest)
    assert blob is not None
    assert [path.name for path in blob.parent.iterdir()] == [digest.replace(":", "-")]
    assert hub.create("made", blob).sha256 == digest.removeprefix("sha256:")
    hub.remove("made")
    assert not blob.exists()


def test_what_a_killed_upload_has_left_is_removed_a_day_later(file: Path) -> None:
    content = file.read_bytes()
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    code = f"""
import os, signal
from irkit import hub
with hub.blob_writer({digest!r}) as write:
    write(b"GGUF")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = hub.home() / "models" / "blobs"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGKILL
    old, new = folder.iterdir()
    assert old.name.startswith(f".{digest.replace(':', '-')}.")
    (folder / ".other").touch()
    day = time.time() - 25 * 3600
    for path in (old, folder / ".other"):
        os.utime(path, (day, day))
    with hub.blob_writer(digest) as write:
        write(content)
    assert {path.name for path in folder.iterdir()} == {new.name, ".other", digest.replace(":", "-")}


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../x", "md5:" + "0" * 64, "sha256:" + "A" * 64])
def test_what_is_no_digest(digest: str) -> None:
    with pytest.raises(OptionError, match="is no digest"):
        hub.blob(digest)
    with pytest.raises(OptionError, match="is no digest"), hub.blob_writer(digest):
        pass
