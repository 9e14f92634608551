"""Models from an Ollama registry, which here speaks its protocol, or on purpose does not."""

import gzip
import hashlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from misbehaving import FakeHub, Handler, cut_after, left_over, obey, pull, status

from irkit import hub as models
from irkit.errors import OptionError, PullError

LAYER = "application/vnd.ollama.image."
TEMPLATE = "{{ .System }}|{{ .Prompt }}|{{ .Response }}"
TEXTS = {
    "template": TEMPLATE.encode(),
    "system": b"Be brief.",
    "params": json.dumps({"stop": ["<|end|>"], "temperature": 0.25, "num_ctx": 64}).encode(),
    "license": b"MIT",
}


def serve(hub: FakeHub, layers: dict[str, bytes], name: str = "library/tiny", tag: str = "1b") -> None:
    listed = []
    for kind, content in layers.items():
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        hub.files[f"/v2/{name}/blobs/{digest}"] = content
        listed.append({"mediaType": LAYER + kind, "digest": digest, "size": len(content)})
    manifest = {"schemaVersion": 2, "config": {"digest": "sha256:0"}, "layers": listed}
    hub.files[f"/v2/{name}/manifests/{tag}"] = json.dumps(manifest).encode()


def test_a_model_comes_with_its_template_system_and_options(hub: FakeHub, model: bytes) -> None:
    serve(hub, {"model": model, **TEXTS})
    reports: list[tuple[int, int | None, str]] = []
    made = pull(f"{hub.url}/library/tiny:1b", progress=lambda *report: reports.append(report))
    assert models.find("tiny:1b") == made
    assert made.path.read_bytes() == model
    assert (made.system, made.license) == ("Be brief.", "MIT")
    assert made.options == {"stop": ["<|end|>"], "temperature": 0.25, "num_ctx": 64}
    assert made.template is not None
    assert "{%" in made.template
    assert made.source == hub.url.removeprefix("http://") + "/library/tiny:1b"
    assert reports[-1][:2] == (len(model), len(model))
    assert hub.gets("Accept")[0] == "application/vnd.docker.distribution.manifest.v2+json"
    asked = len(hub.seen)
    assert pull(f"{hub.url}/library/tiny:1b") == made
    assert not any(LAYER in path or made.sha256 in path for _, path, _ in hub.seen[asked:])


def test_a_model_whose_system_prompt_changed_is_not_fetched_again(hub: FakeHub, model: bytes) -> None:
    serve(hub, {"model": model, "system": b"One."})
    pull(f"{hub.url}/library/tiny:1b")
    serve(hub, {"model": model, "system": b"Two."})
    assert pull(f"{hub.url}/library/tiny:1b").system == "Two."
    blob = hashlib.sha256(model).hexdigest()
    assert sum(path.endswith(blob) for _, path, _ in hub.seen) == 1


@pytest.mark.parametrize(
    ("asked", "served", "name"),
    [
        ("tiny", ("library/tiny", "latest"), "tiny"),
        ("tiny:1b-Q4_0", ("library/tiny", "1b-Q4_0"), "tiny:1b-q4_0"),
        ("someone/Tiny:1b", ("someone/Tiny", "1b"), "someone/tiny:1b"),
        ("ollama.com/library/tiny:1b", ("library/tiny", "1b"), "tiny:1b"),
        ("https://ollama.com/tiny", ("library/tiny", "latest"), "tiny"),
    ],
)
def test_names(
    hub: FakeHub, model: bytes, monkeypatch: pytest.MonkeyPatch, asked: str, served: tuple[str, str], name: str
) -> None:
    monkeypatch.setattr("irkit.hub.ollama.HOST", hub.url)
    serve(hub, {"model": model}, *served)
    assert pull(asked).name == name
    assert pull(f"{hub.url.removeprefix('http://')}/{served[0]}:{served[1]}").name == name


def test_a_pull_goes_on_where_it_stopped(hub: FakeHub, model: bytes) -> None:
    serve(hub, {"model": model})

    hub.script = [obey, cut_after(1000), *[cut_after(0)] * 4]
    with pytest.raises(PullError, match="given up"):
        pull(f"{hub.url}/library/tiny:1b")
    hub.script = []
    pull(f"{hub.url}/library/tiny:1b")
    assert hub.gets()[-1] == "bytes=1000-"
    assert left_over() == ["tiny@1b.gguf"]


def test_what_cannot_be_used_is_left_out_with_a_warning(hub: FakeHub, model: bytes) -> None:
    params = {"temperature": "hot", "top_k": 7, "num_gpu": 1, "nonsense": []}
    layers = {"template": b"{{ range .Tools }}x{{ end }}", "params": json.dumps(params).encode(), "projector": b"x"}
    serve(hub, {"model": model, **layers})
    with pytest.warns(UserWarning, match="left out") as caught:
        made = pull(f"{hub.url}/library/tiny:1b")
    told = " ".join(str(warning.message) for warning in caught)
    assert all(word in told for word in ("temperature", "num_gpu", "nonsense", "the model file's own", "images"))
    assert (made.options, made.template) == ({"top_k": 7}, None)


def _changed(**fields: Any) -> Callable[[FakeHub], None]:
    def change(hub: FakeHub) -> None:
        path = "/v2/library/tiny/manifests/1b"
        manifest = json.loads(hub.files[path])
        manifest["layers"][0] |= fields
        hub.files[path] = json.dumps(manifest).encode()

    return change


def _put(content: bytes) -> Callable[[FakeHub], None]:
    return lambda hub: hub.files.update({"/v2/library/tiny/manifests/1b": content})


def _zipped(handler: Handler, content: bytes) -> None:
    body = gzip.compress(content)
    handler.head(200, {"Content-Encoding": "gzip", "Content-Length": str(len(body))})
    handler.wfile.write(body)


def _script(*answers: Any) -> Callable[[FakeHub], None]:
    return lambda hub: hub.script.extend(answers)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda hub: hub.files.clear(), "there is no library/tiny:1b at 127.0.0.1"),
        (_script(status(500)), "the registry answers 500"),
        (_put(b"<html>"), "no manifest"),
        (_put(b'{"layers": []}'), "has no GGUF file"),
        (_put(b"[" * 100_000), "no manifest"),
        (_put(b" " * (2 << 20)), "more than 1048576 bytes"),
        (_script(_zipped), "compressed"),
        (_changed(mediaType=LAYER + "adapter"), "an adapter, which is not supported"),
        (_changed(digest="sha256:../../../../etc/passwd"), "no manifest"),
        (_changed(digest="sha256:" + "0" * 64), "no such file"),
        (_changed(size=-1), "no manifest"),
        (_changed(size=1 << 60), "has a file of"),
        (_script(status(401, WWW_Authenticate='Bearer realm="http://169.254.169.254/"')), "not the registry's own"),
        (_script(status(401, WWW_Authenticate='Bearer realm="http://127.0.0.1:1/"')), "not the registry's own"),
        (_script(status(401)), "not the registry's own"),
        (_script(status(302, Location="/v2/library/tiny/manifests/1b")), None),
    ],
)  # fmt: skip
def test_faults_of_a_registry(
    hub: FakeHub, model: bytes, fault: Callable[[FakeHub], None], message: str | None
) -> None:
    serve(hub, {"model": model, "system": b"Hm."})
    fault(hub)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if message is None:
            assert pull(f"{hub.url}/library/tiny:1b").system == "Hm."
            return
        with pytest.raises(PullError, match=message) as caught:
            pull(f"{hub.url}/library/tiny:1b")
    assert "\n" not in str(caught.value)
    assert models.models() == []
    assert left_over() == []


def test_wrong_bytes_are_refused(hub: FakeHub, model: bytes) -> None:
    serve(hub, {"model": model, "system": b"Hm."})
    for path, content in hub.files.items():
        if path.endswith(hashlib.sha256(model).hexdigest()):
            hub.files[path] = content[:-1] + b"?"
    with pytest.raises(PullError, match="should have the sha256"):
        pull(f"{hub.url}/library/tiny:1b")
    serve(hub, {"model": model, "system": b"Hm."})
    hub.files[f"/v2/library/tiny/blobs/sha256:{hashlib.sha256(b'Hm.').hexdigest()}"] = b"Ha."
    with pytest.raises(PullError, match="have another sha256"):
        pull(f"{hub.url}/library/tiny:1b")


def test_a_token_is_asked_of_the_registry_itself_and_sent_to_it_alone(hub: FakeHub, model: bytes) -> None:
    serve(hub, {"model": model})
    hub.files["/token?service=s&scope=r"] = b'{"token": "t0ken"}'
    challenge = f'Bearer realm="{hub.url}/token",service="s",scope="r"'
    hub.script = [status(401, WWW_Authenticate=challenge)]
    pull(f"{hub.url}/library/tiny:1b")
    assert hub.gets("Authorization") == [None, None, "Bearer t0ken", "Bearer t0ken"]


@pytest.mark.parametrize(
    "name", ["a/b/c/d", "-x:1", "x:", "library/../x", "http://example.com/library/x", "x:1:2", "hf.co/x", "a b"]
)
def test_what_is_no_name(hub: FakeHub, name: str) -> None:
    with pytest.raises(OptionError):
        pull(name)
    assert hub.seen == []
