"""`irkit bench`: that it measures what it says; how fast anything is, no test asks."""

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from rich.console import Console

from irkit import Session
from irkit.bench import Measure, Report, as_table, bench, measure, serving, worker
from irkit.bench.machine import busy_core, memory_bandwidth
from irkit.bench.measure import Worker, kv_bytes, weight_bytes
from irkit.errors import BackendError, ModelFileError, ModelNotFoundError, OptionError
from irkit.options import BenchOptions

LOAD = {"precision": "fast", "num_ctx": None, "backend": None, "threads": 1}
SHORT: dict[str, Any] = {"prompt_lengths": (8,), "contexts": (8,), "num_predict": 4, "runs": 1}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure each speed once in a run."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)


def medians(told: dict[str, Any], engine: str) -> dict[tuple[str, int | None], float]:
    return {(m["name"], m["tokens"]): m[engine]["median"] for m in told["measures"]}


def test_the_command_tells_all_it_measured(model_path):
    words = ["--json", "--runs", 1, "--num-predict", 4, "--threads", 1, "--prompt-lengths", 1, "--prompt-lengths", 8]
    hurried = "from irkit.bench import measure; measure.SECONDS = 0.0; from irkit.cli import main; main()"
    command = [sys.executable, "-c", hurried, "bench", model_path, *words, "--contexts", 8, "--json-format"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"{model_path}: warming up", f"{model_path}: run 1 of 1"]
    (told,) = json.loads(done.stdout)
    found = medians(told, "irkit")
    expected = [("import", None), ("load", None), ("first_token", 1), ("prefill", 1), ("prefill", 8)]
    decoding = [("decode", 8), ("decode_json", 8), ("json_masks", 8), ("of_bandwidth", 8)]
    assert list(found) == [*expected, *decoding, ("peak_memory", None)]
    assert found["json_masks", 8] < 1 / found["decode_json", 8]
    assert all(0 < value < math.inf for value in found.values())
    # Every weight is read once a token, and the keys and values of the 8 to 12 tokens before it.
    reads = found["decode", 8] * (told["weight_bytes"] + 23_040 * 10)
    assert found["of_bandwidth", 8] == pytest.approx(reads / told["bandwidth"][0])
    assert found["peak_memory", None] > told["weight_bytes"]
    assert (told["size"], told["threads"], told["busy"]) == (model_path.stat().st_size, 1, False)
    assert "1 thread," in told["engines"]["irkit"]


def test_a_peer_is_measured_in_turns(model_path, hurried, monkeypatch):
    pytest.importorskip("llama_cpp")
    asked = []
    ask = Worker.ask

    def note(self: Worker, **request: Any) -> float:
        asked.append((request["what"], self.engine))
        return ask(self, **request)

    monkeypatch.setattr(Worker, "ask", note)
    report = bench(model_path, BenchOptions(**SHORT, vs="llama.cpp", threads=1))
    told = json.loads(json.dumps(report.as_json()))
    assert medians(told, "llama.cpp").keys() == medians(told, "irkit").keys()
    assert list(told["engines"]) == ["irkit", "llama.cpp"]
    turns = asked[-10:]  # before them irkit warmed up
    assert [engine for _, engine in turns] == ["irkit", "llama.cpp"] * 5
    assert [what for what, _ in turns[::2]] == [what for what, _ in turns[1::2]]
    for m in told["measures"]:
        assert m["irkit / llama.cpp"] == pytest.approx(m["irkit"]["median"] / m["llama.cpp"]["median"])
        assert m["llama.cpp"]["median"] > 0


def test_servers_are_measured_too(tmp_path, hurried, write_model, monkeypatch):
    model = write_model(tmp_path / "words.gguf", more={f"word{number}": 4 for number in range(100)})
    for name, value in {"CLIENTS": 3, "LONG": 200, "TURNS": 2}.items():
        monkeypatch.setattr(serving, name, value)
    report = bench(model, BenchOptions(**SHORT, serve=True, threads=1))
    found = medians(json.loads(json.dumps(report.as_json())), "irkit")
    rows = [("serve", 1), ("serve", 3), ("serve_gain", 3), ("serve_first_token", 200), ("serve_chunks", 200)]
    assert [key for key in found if key[0].startswith("serve")] == [*rows, ("serve_long", 200), ("serve_cost", None)]
    cost = found.pop(("serve_cost", None))
    assert -1 < cost < math.inf
    assert all(0 < value < math.inf for value in found.values())
    assert found["serve_gain", 3] == pytest.approx(found["serve", 3] / found["serve", 1])
    output = io.StringIO()
    Console(file=output, width=100).print(as_table(report))
    shown = " ".join(output.getvalue().replace("│", " ").split())
    assert f"serving 3 at once {found['serve', 3]:,.1f} tokens/s" in shown
    assert f"cost of streaming over HTTP {cost:.0%}" in shown


def test_a_server_that_does_not_start_is_one_clear_error(tmp_path):
    with (
        pytest.raises(BackendError, match=r"no server answers at http://127\.0\.0\.1:\d+"),
        serving.server("irkit", tmp_path / "nosuch.gguf", 1),
    ):
        pass


def test_a_peer_that_cannot_open_a_file_says_so(tmp_path):
    pytest.importorskip("llama_cpp")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with (
        Worker("llama.cpp", LOAD) as peer,
        pytest.raises(BackendError, match=r"llama\.cpp cannot open .*bad\.gguf"),
    ):
        peer.ask(what="load", path=str(tmp_path / "bad.gguf"), tokens=16)


def test_a_peer_that_is_not_installed_is_one_clear_error(model_path, monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"llama\.cpp is not installed here; pip install 'irkit\[bench\]'"):
        bench(model_path, BenchOptions(vs="llama.cpp"))


def test_what_cannot_be_measured_is_refused_at_once(model_path, tmp_path):
    with pytest.raises(OptionError, match="need room for 2113 tokens; the context holds 1000"):
        bench(model_path, BenchOptions(num_ctx=1000))
    with pytest.raises(ModelNotFoundError, match="nosuch"):
        bench("nosuch", BenchOptions())
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"bad\.gguf"):
        bench(tmp_path / "bad.gguf", BenchOptions())


@pytest.mark.parametrize("words", [["--vs", "other"], ["--contexts", "0"], ["--runs", "0"]], ids=" ".join)
def test_a_wrong_option_is_named(words):
    done = subprocess.run([sys.executable, "-m", "irkit", "bench", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"irkit: {words[0]} must be ")
    assert done.stderr.count("\n") == 1


def test_an_error_of_irkit_comes_out_of_its_process(tmp_path):
    with Worker("irkit", LOAD) as ours, pytest.raises(ModelNotFoundError, match=r"nosuch\.gguf"):
        ours.ask(what="load", path=str(tmp_path / "nosuch.gguf"), tokens=16)


def test_a_process_that_dies_is_one_clear_error(monkeypatch, tmp_path):
    ours = Worker("irkit", LOAD)
    ours._process.kill()
    ours._process.wait()
    with ours, pytest.raises(BackendError, match=r"the process that measures irkit ended with code -9"):
        ours.ask(what="peak_memory")


def test_the_peers_process_holds_nothing_of_irkit():
    # The command line of a worker, with its engine left out.
    script = f"""
import runpy, sys
sys.argv = ["worker.py"]
runpy.run_path({str(Path(worker.__file__))!r})
print([name for name in sys.modules if name.startswith(("irkit", "numpy", "jax"))])
"""
    shown = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"


def test_a_measure_is_repeated_for_as_long_as_asked_behind_one_that_does_not_count():
    numbers = []

    def once(number: int) -> float:
        numbers.append(number)
        return {-1: 100.0, 0: 1.0, 1: 3.0, 2: 2.0}[number]

    assert worker.repeat(once, 6.0) == 2.0
    assert numbers == [-1, 0, 1, 2]


def test_prompts_are_new_each_time_the_same_for_every_engine_and_as_long_as_asked():
    class Recorder:
        d_vocab = 50

        def __init__(self) -> None:
            self.prompts: list[list[int]] = []

        def prefill(self, ids: list[int]) -> float:
            self.prompts.append(ids)
            return 1.0

    first, second = Recorder(), Recorder()
    for each in (first, second):
        worker.answer(each, "prefill", tokens=20, seconds=3.0)  # pyright: ignore[reportArgumentType]
    assert first.prompts == second.prompts
    assert len({tuple(ids) for ids in first.prompts}) == 4
    assert {len(ids) for ids in first.prompts} == {20}


def test_irkit_reads_nothing_from_its_cache_where_it_should_not_and_makes_every_token(model_path):
    ours = worker.Irkit(LOAD)
    ours.open(str(model_path), 64)
    generations = []
    generate = ours.session.generate

    def note(*arguments: Any, **options: Any) -> Any:
        generations.append(generate(*arguments, **options))
        return generations[-1]

    ours.session.generate = note  # pyright: ignore[reportAttributeAccessIssue]
    ids = list(range(40, 60))
    assert min(ours.prefill(ids), ours.prefill(ids), ours.first_token(ids), ours.decode(ids, 5)) > 0
    assert [g.stats.cached_tokens for g in generations] == [0, 0, 0, 19]
    assert [g.stats.tokens for g in generations] == [1, 1, 1, 6]
    # Behind a whole answer the model would end it at once.
    session = ours.session
    answer = session.respond("What is 1 + 1?", temperature=0, num_predict=60)
    assert answer.finish_reason == "stop"
    asked = session.model.template.encode(session.model.tokenizer, [{"role": "user", "content": "What is 1 + 1?"}])
    ended = [*asked, *(token.id for token in answer.tokens[:-1])]
    assert ours.decode(ended, 5) > 0
    assert generations[-1].stats.tokens == 6
    session.close()


def test_bytes_that_a_token_reads(model_path):
    with Session(model_path) as session:
        assert weight_bytes(session.model) == sum(t.nbytes for t in session.model.file.tensors.values())
        assert kv_bytes(session.model, 1) == 2 * 30 * 3 * 64 * 2
    tensors = {"token_embd.weight": SimpleNamespace(nbytes=100), "output.weight": SimpleNamespace(nbytes=7)}
    untied: Any = SimpleNamespace(file=SimpleNamespace(tensors=tensors))
    assert weight_bytes(untied) == 7


def test_ratios_are_of_pairs():
    speeds = Measure("decode", 64, {"irkit": [2.0, 30.0, 8.0], "llama.cpp": [1.0, 10.0, 8.0]})
    assert speeds.median("irkit") == 8.0
    assert speeds.ratio("llama.cpp") == 2.0  # of the medians it would be 1


def test_the_table_shows_medians_units_and_ratios():
    report = Report(
        model="tiny",
        path="tiny.gguf",
        size=98_000_000,
        weight_bytes=90_000_000,
        threads=2,
        busy=True,
        engines={"irkit": "2 threads", "llama.cpp": "AVX2"},
        bandwidth=[40e9, 20e9, 30e9],
        warm_up=9.0,
        measures=[
            Measure("load", None, {"irkit": [0.5], "llama.cpp": [0.25]}),
            Measure("decode", 512, {"irkit": [150.0], "llama.cpp": [100.0]}),
            Measure("of_bandwidth", 512, {"irkit": [0.6], "llama.cpp": [0.4]}),
            Measure("peak_memory", None, {"irkit": [300e6], "llama.cpp": [200e6]}),
        ],
    )
    output = io.StringIO()
    Console(file=output, width=100).print(as_table(report))
    shown = " ".join(output.getvalue().replace("│", " ").split())
    assert "loading, to a first token 500 ms 250 ms 2.00" in shown
    assert "decode at context 512 150.0 tokens/s 100.0 tokens/s 1.50" in shown
    assert "of memory bandwidth, at 512 60% 40% 1.50" in shown
    assert "peak memory 300 MB 200 MB 1.50" in shown
    assert "memory read at 30.0 GB/s by 2 threads, one core kept busy" in shown


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_as_fast_as_memory_is(threads):
    # Between the slowest memory still in use and what no cache reaches: a pass that read nothing would be faster.
    assert 1e8 < memory_bandwidth(threads, size=32 << 20) < 1e13


def test_a_core_is_busy_while_it_should_be():
    before = set(psutil.Process().children())
    with busy_core(True):
        (busy,) = set(psutil.Process().children()) - before
        until = time.monotonic() + 60
        while busy.cpu_times().user < 0.1:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert not busy.is_running()
    with busy_core(False):
        assert set(psutil.Process().children()) == before


def test_the_most_memory_is_what_was_held():
    code = (
        "from irkit.bench.worker import peak_memory as peak; b = peak(); x = bytearray(b'a') * (64 << 20)\n"
        "del x; print(peak() - b)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 60 << 20 < int(shown.stdout) < 200 << 20
