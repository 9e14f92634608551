"""The device's thread: order, errors, and an exit that waits for no endless answer."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from irkit.engine.worker import Worker


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
