"""Programs that people reach OpenAI-compatible servers with, each in a process of its own, as they are used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from irkit import Session

QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Lyon", "Mars"], "answer": 0},
    {"question": "Two and two make", "choices": ["nine", "a horse", "four"], "answer": 2},
    {"question": "Grass is", "choices": ["purple", "green"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["warm", "cold", "tall"], "answer": 1},
]
TASK = """
task: irkit_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args=dict(model="smollm2", base_url=sys.argv[1] + "/v1/completions", max_length=2048, num_concurrent=1),
    tasks=["irkit_questions"],
    task_manager=TaskManager(include_path=sys.argv[2], include_defaults=False),
    batch_size=3,
)
samples = sorted(found["samples"]["irkit_questions"], key=lambda sample: sample["doc_id"])
likelihoods = [[pair for pair in sample["filtered_resps"]] for sample in samples]
print(json.dumps({"acc": found["results"]["irkit_questions"]["acc,none"], "likelihoods": likelihoods}))
"""
LITELLM = """
import json, sys
import litellm

url = sys.argv[1]
say = [{"role": "user", "content": "Name three colours."}]
options = dict(messages=say, max_tokens=8, temperature=0, seed=1)
text = lambda reply: reply.choices[0].message.content
streamed = lambda reply: "".join(chunk.choices[0].delta.content or "" for chunk in reply)
openai = dict(model="openai/smollm2", api_base=url + "/v1", api_key="none")
ollama = dict(model="ollama_chat/smollm2", api_base=url)
found = {}
for name, where in (("openai", openai), ("ollama", ollama)):
    found[name] = text(litellm.completion(**where, **options))
    found[name + " streamed"] = streamed(litellm.completion(**where, **options, stream=True))
found["completion"] = litellm.text_completion(
    model="text-completion-openai/smollm2", prompt="One, two, three,", max_tokens=3, temperature=0, **{
        name: openai[name] for name in ("api_base", "api_key")
    }
).choices[0].text
found["embedding"] = len(litellm.embedding(**openai, input=["a cat"]).data[0]["embedding"])
try:
    litellm.completion(**openai | {"model": "openai/nosuchmodel"}, **options)
except litellm.NotFoundError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def run(*words: str | Path, **environment: str) -> str:
    kept = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    result = subprocess.run([*map(str, words)], capture_output=True, text=True, env=kept | environment, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def of_session(session: Session) -> tuple[float, list[list[float]]]:
    """The share of the questions answered right, and the log-likelihood of each choice."""
    right, found = 0, []
    for asked in QUESTIONS:
        start = len(session.tokenize(asked["question"]))
        wholes = [session.tokenize(f"{asked['question']} {choice}") for choice in asked["choices"]]
        found.append([sum(token.logprob or 0 for token in session.score(ids).tokens[start:]) for ids in wholes])
        right += found[-1].index(max(found[-1])) == asked["answer"]
    return right / len(QUESTIONS), found


def test_lm_eval_scores_as_the_session_does(session: Session, tmp_path: Path) -> None:
    data = tmp_path / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "task.yaml").write_text(TASK.format(data=data))
    # Its tokenizer is that of the one model that the server holds: nothing is fetched.
    with session.serve(port=0) as served:
        assert served.model == "smollm2"
        printed = run(sys.executable, "-c", EVALUATE, served.url, tmp_path, HF_HOME=str(tmp_path / "hf"))
    found = json.loads(printed.splitlines()[-1])
    accuracy, likelihoods = of_session(session)
    assert 0.5 <= found["acc"] == accuracy
    for got, want in zip(found["likelihoods"], likelihoods, strict=True):
        assert [float(likelihood) for likelihood, _ in got] == pytest.approx(want, abs=1e-4)


def test_litellm(url: str) -> None:
    found = json.loads(run(sys.executable, "-c", LITELLM, url).splitlines()[-1])
    assert found["openai"] == found["openai streamed"] == found["ollama"] == found["ollama streamed"] != ""
    assert found["completion"] == " four, five"
    assert found["embedding"] == 576
    assert "model 'nosuchmodel' not found" in found["error"]


def test_llm(url: str, tmp_path: Path) -> None:
    models: list[dict[str, Any]] = [
        {"model_id": "chat", "model_name": "smollm2", "api_base": f"{url}/v1", "supports_schema": True},
        {"model_id": "text", "model_name": "smollm2", "api_base": f"{url}/v1", "completion": True},
        {"model_id": "none", "model_name": "nosuchmodel", "api_base": f"{url}/v1"},
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    llm = (sys.executable, "-m", "llm", "prompt", "--no-log")
    options = ("-o", "temperature", "0", "-o", "max_tokens", "40")
    home = {"LLM_USER_PATH": str(tmp_path)}
    streamed = run(*llm, "-m", "chat", *options, "Name three colours.", **home)
    assert streamed == run(*llm, "-m", "chat", "--no-stream", *options, "Name three colours.", **home) != ""
    assert run(*llm, "-m", "text", "-o", "temperature", "0", "-o", "max_tokens", "3", "One, two,", **home).strip()
    properties = {"kind": {"enum": ["dog", "cat"]}, "age": {"type": "integer", "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    formed = run(*llm, "-m", "chat", *options, "--schema", json.dumps(schema), "Invent an animal.", **home)
    assert json.loads(formed).keys() == properties.keys()
    failed = subprocess.run(
        [*llm, "-m", "none", "Hi"], capture_output=True, text=True, env={**os.environ, **home}, timeout=120
    )
    assert failed.returncode != 0
    assert "model 'nosuchmodel' not found" in failed.stderr


NODE = """
import OpenAI from "openai";

const api = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const asked = {
  model: "smollm2", messages: [{ role: "user", content: "Name three colours." }], max_tokens: 8, temperature: 0,
};
const found = { models: [] };
for await (const model of api.models.list()) found.models.push(model.id);
found.whole = (await api.chat.completions.create(asked)).choices[0].message.content;
found.streamed = "";
for await (const chunk of await api.chat.completions.create({ ...asked, stream: true }))
  found.streamed += chunk.choices[0]?.delta?.content ?? "";
const helper = api.chat.completions.stream(asked);
found.helper = (await helper.finalMessage()).content;
found.embedding = (await api.embeddings.create({ model: "smollm2", input: "a cat" })).data[0].embedding.length;
try {
  await api.chat.completions.create({ ...asked, model: "nosuchmodel" });
} catch (error) {
  found.error = [error.status, error.code];
}
console.log(JSON.stringify(found));
"""


@pytest.mark.slow  # it fetches the package
@pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm")
def test_openai_for_node(url: str, tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "ask.js").write_text(NODE)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "openai"], cwd=tmp_path, check=True, timeout=240)
    found = json.loads(run("node", tmp_path / "ask.js", url))
    assert "smollm2" in found["models"]
    assert found["whole"] == found["streamed"] == found["helper"] != ""
    assert (found["embedding"], found["error"]) == (576, [404, "model_not_found"])
