"""Whatever fits or breaks the published schema is answered, and never with an internal error."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case
from schemathesis.generation import GenerationMode

from irkit import hub
from irkit.engine.worker import DEVICE
from irkit.options import ServeOptions
from irkit.server import create_app

UNHEALTHY: Any = list(HealthCheck)
KEPT = {"/api/delete", "/api/create", "/api/copy", "/api/pull", "/api/close"}
"""What is asked of these names no model that others are about to use."""


@pytest.fixture(scope="module")
def app(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The application, with a tiny model, and nothing to pull from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IRKIT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        patch.setattr("irkit.hub.ollama.HOST", "http://127.0.0.1:9")
        hub.add(tiny_path, "tiny")
        app = create_app(ServeOptions(host="0.0.0.0"))  # the client names a host that is none of this machine's
        yield app
        asyncio.run(app.state.sessions.close())


@pytest.fixture(scope="module")
def schema(app: Any) -> Any:
    config = schemathesis.Config.from_dict({"generation": {"mode": "all", "allow-x00": True}})
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config)


def aimed(case: Case) -> None:
    """Have a request name the model there is, and ask for no more than a few tokens of it."""
    body: Any = case.body
    if not isinstance(body, dict) or case.path in KEPT:
        return
    if isinstance(body.get("model"), str) and (len(body["model"]) % 4 or not body["model"]):
        body["model"] = "tiny"
    for name, place in (("num_predict", body), ("max_tokens", body), ("num_predict", body.get("options"))):
        if isinstance(place, dict) and (name in place or place is not body) and not isinstance(place.get(name), str):
            value = place.get(name)
            place[name] = value if isinstance(value, int) and 0 <= value < 4 else 3
    if isinstance(body.get("n"), int) and body["n"] > 2:
        body["n"] = 2


def answers(case: Case) -> None:
    aimed(case)
    reply = case.call(timeout=300)  # to open a model and compile its programs takes a while
    assert reply.status_code < 500 or reply.status_code in (501, 502, 503), (reply.status_code, reply.text[:300])
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error["message"] if case.path.startswith("/v1/") else isinstance(error, str)


def sweep(schema: Any, examples: int) -> int:
    """Ask every route for what fits its schema, and for what does not; how many routes there are."""
    how = settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=UNHEALTHY,
        phases=[Phase.generate],
    )
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            cases = operation.as_strategy(generation_mode=mode)
            with contextlib.suppress(Unsatisfiable):  # nothing breaks the schema of a route that takes nothing
                how(given(case=cases)(answers))()
        count += 1
    return count


def test_nothing_is_an_internal_error(schema: Any) -> None:
    assert sweep(schema, 4) > 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_long_sweep_finds_no_internal_error(schema: Any) -> None:
    sweep(schema, 200)


def test_afterwards_nothing_is_left(app: Any) -> None:
    assert DEVICE.queued == 0
    assert not DEVICE._running
