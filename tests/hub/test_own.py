"""What a model has been given by `irkit create`, on every surface."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import irkit
from irkit import hub
from irkit.server import create_app

IRKIT = [sys.executable, "-c", "from irkit.cli import main; main()"]
TEMPLATE = "{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}"
MODELFILE = """FROM ./tiny.gguf
PARAMETER temperature 0
PARAMETER num_predict 3
PARAMETER num_ctx 48
SYSTEM "he"
"""


@pytest.fixture
def named(tiny_path: Path) -> str:
    own = {"temperature": 0, "num_predict": 3, "num_ctx": 48}
    return hub.create("named", tiny_path, template=TEMPLATE, system="he", options=own).name


def test_a_session_does_what_its_name_says(named: str, tiny_path: Path) -> None:
    with irkit.Session(named) as session, irkit.Session(tiny_path) as plain:
        assert session.info().n_ctx == 48
        assert session.info().chat_template
        assert irkit.Session(named, num_ctx=32).info().n_ctx == 32
        assert (session.defaults.num_predict, session.defaults.top_k) == (3, 40)
        assert plain.defaults == irkit.options.GenerateOptions()

        answer = session.respond("hi")
        spelled_out = plain.generate("s:he;u:hi;", temperature=0, num_predict=3)
        assert answer.text == spelled_out.text
        assert answer.stats.prompt_tokens == spelled_out.stats.prompt_tokens
        assert len(answer.tokens) == 3
        assert len(session.generate("hi", num_predict=2).tokens) == 2
        messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
        assert session.respond(messages).stats.prompt_tokens == len(plain.tokenize("s:;u:hi;"))


def test_over_http(named: str) -> None:
    prompt = {"messages": [{"role": "user", "content": "hi"}], "stream": False, "model": named}
    with TestClient(create_app(), base_url="http://127.0.0.1") as client:
        answered = client.post("/api/chat", json=prompt).json()
        assert (answered["eval_count"], answered["prompt_eval_count"]) == (3, len("s:;u:hi;") + 1)
        answered = client.post("/api/chat", json=prompt | {"options": {"num_predict": 2}}).json()
        assert answered["eval_count"] == 2
        answered = client.post("/api/respond", json=prompt).json()
        assert answered["result"]["stats"]["tokens"] == 3
        answered = client.post("/api/respond", json=prompt | {"num_predict": -1, "stop": [""]})
        assert answered.status_code == 400


def test_on_the_command_line(tiny_path: Path, tmp_path: Path) -> None:
    def run(*words: str) -> str:
        return subprocess.run([*IRKIT, *words], capture_output=True, text=True, check=True).stdout

    (tmp_path / "tiny.gguf").symlink_to(tiny_path)
    (tmp_path / "Modelfile").write_text(MODELFILE)
    (tmp_path / "template").write_text(TEMPLATE)
    words = ("--template", str(tmp_path / "template"), "--parameter", "top_k=7", "--system", "he!")
    assert run("create", "made", "-f", str(tmp_path / "Modelfile"), *words) == "made\n"
    assert run("copy", "made", "copied") == "copied\n"
    copied = hub.find("copied")
    assert copied is not None
    assert copied.options == {"temperature": 0.0, "num_predict": 3, "num_ctx": 48, "top_k": 7}
    assert (copied.template, copied.system) == (TEMPLATE, "he!")
    told = json.loads(run("run", "copied", "hi", "--json"))
    assert (told["stats"]["tokens"], told["stats"]["prompt_tokens"]) == (3, len("s:;u:hi;") + 2)
    assert (
        json.loads(run("run", "copied", "hi", "--json", "--num-predict", "-1", "--stop", "e"))["stats"]["tokens"] != 3
    )
