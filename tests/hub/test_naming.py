"""What a name means, and which model of several."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from misbehaving import FakeHub, pull, write_gguf

from irkit import hub as models
from irkit.errors import ModelNotFoundError, OptionError
from irkit.hub import naming, registry


def put(tmp_path: Path, name: str, source: str) -> None:
    """A model that was fetched from `source`."""
    (models.home() / "models").mkdir(parents=True, exist_ok=True)
    partial = write_gguf(tmp_path / "partial", seed=len(models.models()))
    registry.publish([partial], name, ["0" * 64], source)


@pytest.mark.parametrize(
    ("given", "own"),
    [
        *(("Tiny", "tiny"), ("tiny:latest", "tiny"), ("library/tiny:1B", "tiny:1b"), ("me/tiny:latest", "me/tiny")),
        *(("registry.ollama.ai/library/tiny", "tiny"), ("https://ollama.com/me/tiny:1b", "me/tiny:1b")),
    ],
)
def test_what_is_left_out_is_not_part_of_a_name(tmp_path: Path, given: str, own: str) -> None:
    assert models.own_name(given) == own
    assert models.add(write_gguf(tmp_path / "m.gguf"), given).name == own
    for made in (models.create(given, own), models.copy(own, given)):
        assert made.name == own
    assert [model.name for model in models.models()] == [own]
    assert models.resolve(given) == tmp_path / "m.gguf"
    models.remove(given)
    assert models.models() == []


@pytest.mark.parametrize(
    "name", ["hf.co/me/tiny", "example.com/me/tiny", "https://a/tiny.gguf", "hf.co/me/tiny/a.gguf"]
)
def test_where_a_model_comes_from_is_no_name_to_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(OptionError, match="cannot be a model's name"):
        models.add(write_gguf(tmp_path / "m.gguf"), name)
    with pytest.raises(ModelNotFoundError, match="no model"):
        models.resolve(name)


def test_names_that_differ_are_different_models(tmp_path: Path) -> None:
    names = ["a-b", "a/b", "a:b", "a.b", "a_b", "a/b:c", "a-b:c"]
    for name in names:
        put(tmp_path, name, "https://example.com/m.gguf")
    assert sorted(model.name for model in models.models()) == sorted(names)
    assert len({models.resolve(name).read_bytes() for name in names}) == len(names)


def test_without_a_quantization_it_is_the_usual_one_or_the_only_one(tmp_path: Path) -> None:
    put(tmp_path, "m-q8_0", "hf.co/Org/Repo/sub/M-Q8_0.gguf")
    for name in ("hf.co/org/repo", "huggingface.co/ORG/Repo:latest", "hf.co/org/repo:q8_0"):
        assert models.resolve(name) == models.resolve("m-q8_0")
    put(tmp_path, "m-iq4_xs", "hf.co/org/repo/M-IQ4_XS.gguf")
    with pytest.raises(ModelNotFoundError, match=r"did you mean m-iq4_xs or m-q8_0\?"):
        models.resolve("hf.co/org/repo")
    put(tmp_path, "m-q4_k_m", "hf.co/org/repo/M-Q4_K_M.gguf")
    assert models.resolve("hf.co/org/repo") == models.resolve("m-q4_k_m")
    assert models.resolve("hf.co/org/repo:M-IQ4_XS.gguf") == models.resolve("m-iq4_xs")
    for name in ("hf.co/org/repo:Q4_K", "hf.co/org/repo:Q4", "hf.co/org/repo/M-Q8_0.gguf", "hf.co/org/rep"):
        assert models.find(name) is None


def test_what_was_made_of_a_fetched_model_is_another(tmp_path: Path) -> None:
    put(tmp_path, "m-q8_0", "hf.co/org/repo/M-Q8_0.gguf")
    models.create("a", "m-q8_0", system="Arr.")
    assert models.find("hf.co/org/repo:Q8_0") == models.find("m-q8_0")
    models.remove("hf.co/org/repo:Q8_0")
    with pytest.raises(ModelNotFoundError):
        models.remove("hf.co/org/repo:Q8_0")
    assert [model.name for model in models.models()] == ["a"]


def test_an_address_does_not_remove_what_is_only_called_alike(tmp_path: Path) -> None:
    models.add(write_gguf(tmp_path / "m.gguf"), "org/repo:q8_0")
    for name in ("hf.co/org/repo:q8_0", "example.com/org/repo:q8_0"):
        with pytest.raises(ModelNotFoundError):
            models.remove(name)
    assert models.find("org/repo:q8_0")


def test_models_keep_the_names_they_had_before_there_were_namespaces(
    hub: FakeHub, tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("irkit.hub.ollama.HOST", hub.url)
    put(tmp_path, "someone-tiny:1b", f"{hub.url.removeprefix('http://')}/someone/tiny:1b")
    digest = f"sha256:{'0' * 64}"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": len(model)}
    hub.files["/v2/someone/tiny/manifests/1b"] = json.dumps({"layers": [layer]}).encode()
    assert models.find("someone/tiny:1b") == pull("someone/tiny:1b")
    assert [model.name for model in models.models()] == ["someone-tiny:1b"]
    assert not any("blobs" in path for _, path, _ in hub.seen)


@given(
    st.text(max_size=40)
    | st.text(alphabet="aA.:-_/1", max_size=20)
    | st.text("a:/.Q", max_size=9).map("hf.co/".__add__)
)
def test_any_text_is_a_name_or_a_mistake(text: str) -> None:
    try:
        name = naming.named(text)
    except OptionError:
        with pytest.raises(OptionError):
            models.own_name(text)
        return
    assert naming.means(name, name)
    assert name == naming.named(text.upper().lower())
    if not name.host:
        try:
            own = models.own_name(text)
        except OptionError:
            return
        assert models.own_name(own) == own
        assert "/" not in registry.blob_path(own).name
