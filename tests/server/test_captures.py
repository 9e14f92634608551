"""Traces, lenses, captures and edits over HTTP, of a tiny model behind a real server."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irkit import Session, hub
from irkit.engine import runtime
from irkit.server import captures

TEXT = "hello there"
ASK = {"temperature": 0, "num_predict": 3}


@pytest.fixture(scope="module")
def home(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that knows the tiny model as tiny."""
    folder = tmp_path_factory.mktemp("home")
    compiled = hub.home() / "programs"
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / "programs").symlink_to(compiled)  # they take long to make
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRKIT_HOME", str(folder))
        hub.add(tiny_path, "tiny")
    return folder


@pytest.fixture(autouse=True)
def registered(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRKIT_HOME", str(home))


@pytest.fixture(scope="module")
def tiny(tiny_path: Path) -> Iterator[Session]:
    with Session(tiny_path) as session:
        yield session


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is compiled, or loaded, with something to capture or edit during the test."""
    found = []
    load = runtime.load_or_compile

    def remembered(*arguments: Any, **options: Any) -> Any:
        if options.get("spec"):
            found.append(options["spec"])
        return load(*arguments, **options)

    monkeypatch.setattr(runtime, "load_or_compile", remembered)
    return found


def ask(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json={"model": "tiny", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["result"] if "result" in reply.json() else reply.json()


def refused(client: httpx.Client, path: str, status: Any = 400, **body: Any) -> str:
    reply = client.post(path, json={"model": "tiny", **body})
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def opened(sent: dict[str, str], tmp_path: Path) -> Any:
    """The trace in a reply."""
    import irkit

    assert sent.keys() == {"format", "data"}
    assert sent["format"] == "safetensors"
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    path.write_bytes(base64.b64decode(sent["data"]))
    return irkit.load_trace(path)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_trace_as_lists(client, tiny):
    asked = {"names": ["pattern", "resid_post"], "layers": [1], "logits": "last"}
    found = ask(client, "/api/trace", texts=TEXT, format="json", **asked)
    expected = tiny.trace(TEXT, **asked)
    assert found["ids"] == [list(expected.ids[0])]
    assert found["strings"] == [list(expected.tokens)]
    assert found["arrays"].keys() == {*expected, "logits"}
    for name in expected:
        array = found["arrays"][name]
        assert array["shape"] == list(expected[name].shape)
        assert np.allclose(array["values"], expected[name], atol=1e-5)
    assert np.allclose(found["arrays"]["logits"]["values"], expected.logits, atol=1e-4)
    assert found["provenance"]["names"] == ["attn.hook_pattern", "hook_resid_post"]


def test_minus_infinity_is_null_and_pairs_have_both_arrays(client):
    found = ask(client, "/api/trace", texts=TEXT, names="attn_scores", layers=0, logits="none", format="json")
    scores = found["arrays"]["blocks.0.attn.hook_attn_scores"]["values"][0][0]
    assert scores[0][1:] == [None] * (len(scores) - 1)
    assert None not in scores[-1]
    found = ask(client, "/api/trace", texts=TEXT, names="mlp_out", reduce="top_k", k=3, logits="none", format="json")
    pair = found["arrays"]["blocks.1.hook_mlp_out"]
    assert pair["shape"] == list(np.shape(pair["values"])) == list(np.shape(pair["indices"]))


def test_a_trace_as_a_file(client, tiny, tmp_path):
    pytest.importorskip("irkit.tracefile")
    found = opened(ask(client, "/api/trace", texts=TEXT, names="pattern"), tmp_path)
    expected = tiny.trace(TEXT, names="pattern")
    assert found.keys() == expected.keys()
    assert np.allclose(found["pattern"], expected["pattern"], atol=1e-6)
    assert np.allclose(found.logits, expected.logits, atol=1e-4)


def test_estimate_and_lens(client, tiny):
    found = ask(client, "/api/estimate", texts=TEXT, names=["pattern"])
    expected = tiny.estimate(TEXT, names="pattern")
    assert (found["nbytes"], found["by_name"]) == (expected.nbytes, dict(expected.by_name))
    assert (found["budget"], found["fits"]) == (1 << 28, True)
    lens = ask(client, "/api/lens", text=TEXT, k=2)
    seen = tiny.lens(TEXT, k=2)
    assert lens["ids"] == seen.ids.tolist()
    assert lens["tokens"] == list(tiny.trace(TEXT, names=()).tokens)
    assert lens["strings"][1][0] == [tiny.detokenize([token]) for token in lens["ids"][1][0]]
    likeliest = np.argmax(tiny.trace(TEXT, names=()).logits[0], -1)
    assert [row[0] for row in lens["ids"][-1]] == likeliest.tolist()


def test_edits_change_what_is_traced_and_said(client, tiny):
    out = [{"op": "ablate", "name": "z", "layers": 1, "heads": [0, 2]}]
    z = ask(client, "/api/trace", texts=TEXT, names="z", layers=1, logits="none", edits=out, format="json")
    values = np.array(z["arrays"]["blocks.1.attn.hook_z"]["values"])
    assert not values[:, :, [0, 2]].any()
    assert values[:, :, [1, 3]].any()
    steer = [{"op": "steer", "vector": [3.0, -3.0] * 32, "layers": [0, 1], "strength": 50}]

    def said(**more: Any) -> list[int]:
        reply = ask(client, "/api/respond", messages="hi", stream=False, **ASK, **more)
        return [token["id"] for token in reply["tokens"]]

    plain, steered = said(), said(edits=steer)
    assert steered != plain == said()
    more = {"stream": False, "options": ASK, "logprobs": True, "edits": steer}
    reply = ask(client, "/api/chat", messages=[{"role": "user", "content": "hi"}], **more)
    assert [bytes(entry["bytes"]) for entry in reply["logprobs"]] == list(
        map(tiny.model.tokenizer.token_bytes, steered)
    )


@pytest.mark.parametrize("capture", ["pattern", ["pattern"], {"names": ["pattern"], "layers": [0, 1]}])
def test_tokens_carry_captures_once_each(client, capture):
    body = {"model": "tiny", "messages": "hi", "capture": capture, "capture_format": "json", **ASK}
    *tokens, last = map(json.loads, client.post("/api/respond", json=body).text.splitlines())
    whole = ask(client, "/api/respond", messages="hi", stream=False, capture=capture, capture_format="json", **ASK)
    assert len(tokens) == 3
    for token, again in zip(tokens, whole["tokens"], strict=True):
        array = token["captures"]["arrays"]["blocks.1.attn.hook_pattern"]
        assert array["shape"][:3] == [1, 4, 1]
        assert np.allclose(np.sum(array["values"], -1), 1, atol=1e-5)
        assert np.allclose(
            again["captures"]["arrays"]["blocks.1.attn.hook_pattern"]["values"], array["values"], atol=1e-5
        )
    assert all("captures" not in token for token in last["result"]["tokens"])
    lengths = [token["captures"]["arrays"]["blocks.0.attn.hook_pattern"]["shape"][3] for token in tokens]
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0] + 2]


@pytest.mark.parametrize(
    ("path", "words"),
    [("generate", {"prompt": "hi", "raw": True}), ("chat", {"messages": [{"role": "user", "content": "hi"}]})],
)
def test_ollamas_routes_carry_captures_if_asked(client, path, words):
    body = {"model": "tiny", **words, "options": ASK}
    plain = client.post(f"/api/{path}", json=body).text
    assert "captures" not in plain
    body |= {"capture": {"names": "resid_post", "layers": -1, "reduce": "norm"}, "capture_format": "json"}
    *pieces, last = map(json.loads, client.post(f"/api/{path}", json=body).text.splitlines())
    norms = [p["captures"]["arrays"]["blocks.1.hook_resid_post"]["values"] for p in pieces if "captures" in p]
    assert len(norms) == last["eval_count"] == 3
    whole = client.post(f"/api/{path}", json=body | {"stream": False}).json()
    again = [entry["arrays"]["blocks.1.hook_resid_post"]["values"] for entry in whole["captures"]]
    assert np.allclose(again, norms, rtol=1e-4)


def test_captures_as_files(client, tmp_path):
    pytest.importorskip("irkit.tracefile")
    body = {"model": "tiny", "prompt": "hi", "capture": "resid_post", "options": ASK}
    pieces = [json.loads(line) for line in client.post("/api/generate", json=body).text.splitlines()]
    found = [opened(piece["captures"], tmp_path) for piece in pieces if "captures" in piece]
    assert [trace["resid_post", 1].shape for trace in found] == [(1, 1, 64)] * 3
    whole = client.post("/api/generate", json=body | {"stream": False}).json()
    assert len(whole["captures"]) == 3


def test_more_than_the_budget_is_413_with_the_numbers(client):
    asked = {"texts": TEXT, "names": ["pattern"]}
    error = refused(client, "/api/trace", 413, budget=1000, **asked)
    assert "the budget is 1 kB" in error
    assert "pattern" in error or "logits" in error
    # A request may ask for less than the server gives, and not for more.
    assert ask(client, "/api/estimate", budget=1 << 50, **asked)["budget"] == 1 << 28
    assert ask(client, "/api/estimate", budget=5, **asked)["budget"] == 5
    capture = {"names": "resid_post", "budget": 10}
    for path, words in (("respond", {"messages": "hi"}), ("generate", {"prompt": "hi"})):
        error = refused(client, f"/api/{path}", 413, capture=capture, **words)
        assert "what one token captures takes" in error
        assert "the budget is 10 bytes" in error


def test_a_large_trace_does_not_become_lists(client, monkeypatch):
    monkeypatch.setattr("irkit.as_json.MAX_NUMBERS", 1000)
    error = refused(client, "/api/trace", 413, texts=TEXT, names="pattern", format="json")
    assert "JSON holds at most 1,000" in error
    assert "safetensors" in error
    words = {"messages": "hi", "capture": "resid_post", "capture_format": "json", "stream": False, **ASK}
    assert ask(client, "/api/respond", **words)["tokens"][2]["captures"]
    monkeypatch.setattr("irkit.as_json.MAX_NUMBERS", 200)
    assert "384 numbers" in refused(client, "/api/respond", 413, **words)


def test_many_texts_are_limited(client, tiny, monkeypatch):
    monkeypatch.setattr(captures, "MAX_TEXTS", 2)
    assert "a request may have 2, got 3" in refused(client, "/api/trace", texts=["a", "b", "c"])
    assert "there is none" in refused(client, "/api/trace", texts=[])


def test_what_a_request_may_hold_counts_the_cache(client, tiny):
    asked = {"texts": ["a", "b"], "names": [], "logits": "none"}
    needed = tiny.estimate(**asked)
    assert (needed.nbytes, needed.cache > 1000) == (0, True)
    assert "a KV cache of" in refused(client, "/api/trace", 413, **asked, budget=needed.cache - 1)
    ask(client, "/api/trace", **asked, budget=needed.cache)


def test_a_lens_has_a_budget(client):
    assert "the budget is 1 kB" in refused(client, "/api/lens", 413, text=TEXT, budget=1000)
    assert "200 tokens at 2 layers" in refused(client, "/api/lens", 413, text=TEXT, k=200, budget=25_000)
    assert ask(client, "/api/lens", text=TEXT, k=1, budget=25_000)["layers"] == ["0", "1"]


def steer(**words: Any) -> dict[str, Any]:
    return {"op": "steer", "vector": [1.0] * 64, "layers": 0, **words}


HOSTILE = {
    "width": (steer(vector=[1.0] * 63), "a value of shape [63] does not fit hook_resid_post, which is [b, pos, 64]"),
    "wide": (steer(vector=[[[1.0] * 64]] * 2), "does not fit"),
    "flat": (steer(vector=[[1.0] * 64] * 2), "does not fit"),
    "empty": (steer(vector=[]), "does not fit"),
    "ragged": (steer(vector=[[1.0], [1.0, 2.0]]), "edits: steer"),
    "text": (steer(vector="abc"), "edits: steer"),
    "object": (steer(vector={"a": 1}), "edits: steer"),
    "null": (steer(vector=None), "not finite"),
    "huge": (steer(vector=[1e300] * 64), "not finite"),
    "digits": (steer(vector=[10**400] * 64), "edits: steer"),
    "strength": (steer(strength=1e300), "the strength must be a finite number"),
    "strong": (steer(strength="lots"), 'option "strength" must be a valid number'),
    "layers": (steer(layers="abc"), 'option "layers'),
    "half": (steer(layers=[0.5]), 'option "layers.0" must be a valid integer'),
    "layer": (steer(layers=[2]), "layers: there is no 2; there are 2"),
    "none": (steer(layers=[]), "layers: none is chosen"),
    "position": (steer(positions=[-1000]), "positions: there is no -1000"),
    "name": (steer(name=5), 'option "name" must be a valid string'),
    "named": (steer(name="blocks.7.hook_resid_post"), "there is no layer 7"),
    "long": (steer(name="a" * 300), "at most 200 characters"),
    "more": (steer(factor=2), 'unknown option "factor"'),
    "heads": ({"op": "scale", "name": "z", "factor": 0, "heads": [4]}, "heads: there is no 4; there are 4"),
    "headless": ({"op": "scale", "name": "mlp_out", "factor": 0, "heads": [0]}, "has no heads"),
    "mean": ({"op": "ablate", "name": "k", "mean": [[0.0] * 16] * 3}, "which is [b, pos, 2, 16]"),
    "call": ({"op": "call", "name": "z", "function": "print"}, "one of steer, scale, ablate is needed as op"),
    "op": ({"op": ["steer"]}, "is needed as op"),
    "word": ("steer", "is needed as op"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("path", ["/api/trace", "/api/generate"])
def test_a_wrong_edit_is_refused_before_anything_is_compiled(client, case, path, made):
    edit, words = HOSTILE[case]
    asked = {"texts": TEXT} if path == "/api/trace" else {"prompt": "hi"}
    body = json.dumps({"model": "tiny", **asked, "edits": [edit]})
    reply = client.post(path, content=body)
    assert reply.status_code == 400, reply.text
    assert words in reply.json()["error"] or case == "digits"
    assert len(reply.json()["error"]) < 1000
    assert not made


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"names": "patern"}, "there is no hook point 'patern'"),
        ({"names": ["a" * 1000]}, "at most 200 characters"),
        ({"names": ["z"] * 5000}, "at most 4096 items"),
        ({"layers": [0] * 70_000}, "at most 65536 items"),
        ({"layers": [10**30]}, "layers: there is no"),
        ({"layers": {"a": 1}}, 'option "layers"'),
        ({"heads": [9], "names": "z"}, "heads: there is no 9"),
        ({"k": 10**9}, 'option "k" must be less than or equal to 1000'),
        ({"reduce": "sum"}, 'option "reduce" must be'),
        ({"reduce": "entropy", "names": "z"}, "entropy is of probabilities"),
        ({"positions": [50]}, "positions: there is no 50"),
        ({"budget": -1}, 'option "budget"'),
        ({"format": "csv"}, 'option "format" must be'),
        ({"edits": [steer()] * 65}, "at most 64 items"),
        ({"edits": steer()}, 'option "edits'),
        ({"texts": [[1, 999]]}, "token id 999"),
        ({"texts": 5}, 'option "texts'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_traced_is_400_and_says_why(client, words, error):
    assert error in refused(client, "/api/trace", 400, **{"texts": TEXT, **words})


@pytest.mark.parametrize(
    "capture", [5, {"names": "patern"}, {"name": "z"}, ["z", 5], {"names": "z", "k": 0}, {"budget": "x"}]
)
def test_what_cannot_be_captured_is_400(client, capture):
    for path, words in (("respond", {"messages": "hi"}), ("generate", {"prompt": "hi"})):
        assert refused(client, f"/api/{path}", capture=capture, **words)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
EDIT = st.dictionaries(
    st.sampled_from(["op", "name", "vector", "layers", "heads", "positions", "strength", "factor", "mean"]),
    st.sampled_from(["steer", "scale", "ablate", "z", "pattern", "resid_post", [1.0] * 64, [1.0] * 16, 0, 1]) | JSON,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | st.lists(EDIT, max_size=2), JSON)
def test_whatever_edits_and_layers_are_sent_nothing_breaks(client, edits, layers):
    # estimate lays everything out, and traces the program, without compiling it
    for more in ({"edits": edits}, {"layers": layers}, {"heads": layers, "names": "z"}, {"positions": layers}):
        reply = client.post("/api/estimate", json={"model": "tiny", "texts": "hi", **more})
        assert reply.status_code in (200, 400), (more, reply.text)


def test_other_strengths_compile_nothing(client, made):
    asked = {"texts": TEXT, "names": "resid_post", "layers": 1, "format": "json"}
    ask(client, "/api/trace", edits=[steer()], **asked)
    assert made  # the count can tell
    made.clear()
    norms = {ask(client, "/api/trace", edits=[steer(strength=s, layers=s % 2)], **asked)["arrays"]
             ["blocks.1.hook_resid_post"]["values"][0][0][0] for s in range(1, 6)}  # fmt: skip
    assert len(norms) == 5
    assert not made
