"""The device's thread: order, errors, and an exit that waits for no endless answer."""

import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

import irkit
from irkit.engine.model import Model
from irkit.engine.worker import Steps, Worker
from irkit.observing import ASKED_BY, Asker


def test_jobs_run_in_order_on_one_thread() -> None:
    worker, ran = Worker(), []
    futures = [worker.submit(lambda n=n: (ran.append(n), threading.current_thread())[1]) for n in range(20)]
    threads = {future.result() for future in futures}
    assert ran == list(range(20))
    assert len(threads) == 1
    assert threads.pop() is not threading.main_thread()


def test_an_error_reaches_who_asked_and_stops_nothing_else() -> None:
    worker = Worker()

    def fail() -> None:
        raise ValueError("no")

    failed, after = worker.submit(fail), worker.submit(lambda: 5)
    with pytest.raises(ValueError, match="no"):
        failed.result()
    assert after.result() == 5


def test_the_interpreter_exits_while_an_answer_is_made(model_path: Path) -> None:
    code = f"import irkit; s = irkit.Session({str(model_path)!r}); next(iter(s.generate('a b c', temperature=0)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_client_that_asks_for_much_does_not_keep_out_the_others() -> None:
    worker, begun, go = Worker(), list[str](), threading.Event()
    worker.most = 2
    job = worker.submit(lambda: go.wait(30))

    def answer(client: str, number: int) -> Future[str]:
        def steps() -> Steps:
            begun.append(f"{client}{number}")
            yield None
            yield None
            return client

        ASKED_BY.set(Asker(client=client))
        return worker.answer(steps, threading.Event())

    futures = [copy_context().run(answer, client, n) for client, n in [*(("a", n) for n in range(6)), ("b", 0)]]
    futures += [copy_context().run(answer, client, n) for client, n in [("c", 0), ("b", 1)]]
    go.set()
    assert [future.result(30) for future in futures] == ["a"] * 6 + ["b", "c", "b"]
    assert job.result()
    assert begun[:2] == ["a0", "b0"]
    assert {"c0", "b1"} < {*begun[:5]}, "the others do not wait behind all of the first"
    assert [name for name in begun if name[0] == "a"] == [f"a{n}" for n in range(6)]


def test_who_has_just_come_does_not_wait_for_another_part_of_a_long_answer() -> None:
    worker, parts, half_way, arrived = Worker(), list[str](), threading.Event(), threading.Event()

    def long() -> Steps:
        for part in range(6):
            parts.append(f"long {part}")
            if part == 2:
                half_way.set()
                arrived.wait(30)
            yield None

    def short() -> Steps:
        parts.append("short")
        yield None

    first = worker.answer(long, threading.Event())
    assert half_way.wait(30)
    second = worker.answer(short, threading.Event())
    arrived.set()
    for answer in (first, second):
        answer.result(30)
    assert parts == ["long 0", "long 1", "long 2", "short", "long 3", "long 4", "long 5"]


def test_those_who_have_just_come_begin_before_others_go_on_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, begun, go = Worker(), list[str](), threading.Event()

    def answer(name: str, seconds: float) -> Steps:
        for part in range(2):
            begun.append(f"{name} {part}")
            time.sleep(seconds)
            yield None

    def ask(names: str, seconds: float) -> None:
        go.clear()
        begun.clear()
        worker.submit(lambda: go.wait(30))
        made = [worker.answer(lambda name=name: answer(name, seconds), threading.Event()) for name in names]
        go.set()
        for each in made:
            each.result(30)

    monkeypatch.setattr("irkit.engine.worker._TOGETHER_SECONDS", 30)
    ask("abc", 0)
    assert begun == ["a 0", "b 0", "c 0", "a 1", "b 1", "c 1"]
    monkeypatch.setattr("irkit.engine.worker._TOGETHER_SECONDS", 0)
    ask("abc", 0.001)
    assert begun == ["a 0", "b 0", "a 1", "c 0", "b 1", "c 1"]


def test_answers_go_on_while_another_model_is_loaded(
    session: irkit.Session, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, go, loading = Model._load, threading.Event(), threading.Event()

    def slowly(self: Model, show: Any) -> Any:
        loading.set()
        assert go.wait(60)
        return load(self, show)

    session.generate("Once", num_predict=1).wait()
    monkeypatch.setattr(Model, "_load", slowly)
    with irkit.Session(tiny_path, backend="cpu", threads=1) as other:
        late = other.generate("hello", num_predict=2)
        assert loading.wait(60)
        assert session.generate("Once upon", num_predict=5).wait_for(60)
        assert not late.done
        left = other.generate("hello", num_predict=2)
        left.cancel()
        late.cancel()  # or it would keep the other from beginning
        for answer in (late, left):
            assert (answer.finish_reason, answer.stats.tokens) == ("cancelled", 0)
        late = other.generate("hello", num_predict=2)
        go.set()
        assert late.stats.tokens <= 2


def test_a_model_that_cannot_be_loaded_fails_its_answers_and_is_loaded_again(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Model, show: Any) -> Any:
        raise MemoryError("no more")

    with irkit.Session(tiny_path, backend="cpu", threads=2, num_ctx=64) as session:
        with monkeypatch.context() as patch:
            patch.setattr(Model, "_load", fails)
            with pytest.raises(MemoryError):
                session.generate("hello", num_predict=2).wait()
        assert session.pooled().generate("hello", num_predict=2, logit_bias={257: -100}).stats.tokens == 2
