import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from real import eventually

from irkit.server import create_app

CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0}


def samples(client: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every sample, by its name and the values of its labels."""
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(reply.text)
    return {(s.name, *map(str, s.labels.values())): s.value for family in families for s in family.samples}


def grown(client: httpx.Client, before: dict[tuple[str, ...], float], *key: str) -> float:
    return samples(client).get(key, 0) - before.get(key, 0)


def test_requests_are_counted_by_route_and_status(client):
    before = samples(client)
    client.post("/v1/chat/completions", json=CHAT)
    client.post("/v1/chat/completions", json=CHAT | {"model": "nosuchmodel"})
    client.get("/v1/models/smollm2")
    client.get("/nowhere/at/all")
    client.request("BREW", "/api/health")
    client.get("/api/health", headers={"host": "evil.example"})
    count = "irkit_requests_total"
    assert grown(client, before, count, "POST", "/v1/chat/completions", "200") == 1
    assert grown(client, before, count, "POST", "/v1/chat/completions", "404") == 1
    assert grown(client, before, count, "GET", "/v1/models/{name:path}", "200") == 1
    assert grown(client, before, count, "GET", "other", "404") == 1
    assert grown(client, before, count, "GET", "other", "403") == 1
    assert not any("BREW" in key or "/nowhere/at/all" in key for key in samples(client))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/chat", "/api/respond"])
def test_tokens_and_times_of_answers(client, path):
    body = CHAT if path[1] == "v" else CHAT | {"stream": False, "options": {"num_predict": 5}}
    if path == "/api/respond":
        body = {"model": "smollm2", "messages": CHAT["messages"], "num_predict": 5, "stream": False}

    def answer() -> dict[tuple[str, ...], float]:
        """Ask, and wait until it is counted, beside the reply: what the samples were before."""
        before = samples(client)
        client.post(path, json=body)
        eventually(lambda: grown(client, before, "irkit_answers_total", "smollm2", "length"))
        return before

    answer()
    before = answer()
    prompt = grown(client, before, "irkit_prompt_tokens_total", "smollm2")
    assert grown(client, before, "irkit_generated_tokens_total", "smollm2") == 5
    assert grown(client, before, "irkit_cached_tokens_total", "smollm2") == prompt - 1 > 10
    assert grown(client, before, "irkit_answers_total", "smollm2", "length") == 1
    for name in ("irkit_first_token_seconds", "irkit_tokens_per_second"):
        assert grown(client, before, f"{name}_count", "smollm2") == 1
        assert grown(client, before, f"{name}_sum", "smollm2") > 0


def test_what_a_format_costs(client):
    names = ("irkit_form_tokens_total", "irkit_form_seconds_total")
    body = {"model": "smollm2", "prompt": "A list:", "raw": True, "stream": False}

    def answer(**more: object) -> list[float]:
        """How many tokens a format has restricted, and for how long they were looked for."""
        before = samples(client)
        options = {"temperature": 0, "num_predict": 12}
        assert client.post("/api/generate", json=body | {"options": options, **more}).status_code == 200
        made = "irkit_generated_tokens_total", "smollm2"
        eventually(lambda: grown(client, before, "irkit_answers_total", "smollm2", "length"))
        assert grown(client, before, *made) == 12
        return [grown(client, before, name, "smollm2") for name in names]

    assert answer() == [0, 0]
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 50}
    tokens, seconds = answer(format=schema)
    assert tokens == 12
    assert 0 < seconds < 60


def test_what_is_going_on(client):
    body = {"model": "smollm2", "prompt": "1, 2, 3,", "temperature": 0, "max_tokens": 4000, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
        found = samples(client)
        assert (found["irkit_slots_busy",], found["irkit_queue",]) == (1, 0)
        assert found["irkit_slots",] >= 1
        assert found["irkit_models",] >= 1
        assert found["irkit_models_bytes",] > 50e6
        assert found["irkit_memory_bytes",] > found["irkit_models_bytes",]
    eventually(lambda: not samples(client)["irkit_slots_busy",])
    eventually(lambda: grown(client, found, "irkit_answers_total", "smollm2", "cancelled") == 1)


def test_two_servers_in_a_process_count_apart():
    first, second = create_app(), create_app()
    assert first.state.metrics.registry is not second.state.metrics.registry
