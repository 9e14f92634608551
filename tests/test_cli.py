"""The command line as people meet it: a process of its own, with pipes or a terminal."""

import contextlib
import fcntl
import functools
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import irkit
from irkit import Session, hub
from irkit.cli.terminal import wait
from irkit.hub.registry import clean_name

IRKIT = [sys.executable, "-c", "from irkit.cli import main; main()"]
# Makes the terminal that is standard input the controlling one, so that its Ctrl-C is a signal.
IN_TERMINAL = [
    sys.executable,
    "-c",
    "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from irkit.cli import main; main()",
]


@pytest.fixture(scope="session")
def session(model_path: Path) -> Iterator[Session]:
    with Session(model_path) as session:
        yield session


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry without models; the compiled programs are the real ones, as they take long to make."""
    programs = hub.home() / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    (tmp_path / "programs").symlink_to(programs)
    monkeypatch.setenv("IRKIT_HOME", str(tmp_path))
    return tmp_path


def irkit_(*words: object, given: str | bytes = "") -> subprocess.CompletedProcess[str]:
    """Runs a command with `given` piped into it."""
    data = given.encode() if isinstance(given, str) else given
    done = subprocess.run([*IRKIT, *map(str, words)], input=data, capture_output=True, timeout=240)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_version():
    assert irkit_("--version").stdout == f"irkit {irkit.__version__}\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "nosuch", "hi"], 1, "irkit: no model 'nosuch'"),
        (["info", "nosuch.gguf"], 1, "irkit: no file at 'nosuch.gguf'"),
        (["info", __file__], 1, "irkit: "),
        (["run", "m", "hi", "--temperature", "warm"], 2, "irkit: --temperature must be a valid number"),
        (["run", "m", "hi", "--top-p", "1.5"], 2, "irkit: --top-p must be less than or equal to 1, got '1.5'"),
        (["run", "m", "hi", "--precision", "sloppy"], 2, "irkit: --precision must be 'fast' or 'exact'"),
        (["run", "m", "hi", "--logit-bias", "5"], 2, "irkit: --logit-bias must be KEY=VALUE"),
        (["run", "m", "hi", "--logit-bias", "5=lots"], 2, "irkit: --logit-bias must be a valid number"),
        (["run", "m", "hi", "--stop", ""], 2, "irkit: --stop: a stop string must not be empty"),
        (["run", "m"], 2, "irkit: there is no prompt"),
        (["score", "m"], 2, "irkit: TEXT is missing"),
        (["chat", "m"], 1, "irkit: no model 'm'"),
        (["respond", "m", "hi", "--tools", "{"], 2, "irkit: --tools must be JSON"),
        (["detokenize", "m", "one"], 2, "irkit: IDS must be a valid integer"),
        (["trace", "m", "hi", "--layers", "0,x"], 2, "irkit: --layers must be a valid integer"),
        (["trace", "m", "hi", "--k", "0"], 2, "irkit: --k must be greater than or equal to 1"),
        (["trace", "m", "hi", "--reduce", "sum"], 2, "irkit: --reduce must be 'none', 'last'"),
        (["trace", "m", "hi", "--edits", "[{"], 2, "irkit: --edits must be JSON"),
        (["trace", "m", "hi", "--edits", "{}"], 2, "irkit: --edits must be an instance of Sequence, got {}"),
        (["trace", "m", "hi", "-o", "no/such/folder/t"], 2, "irkit: --output: no file can be made at"),
        (["lens", "m"], 2, "irkit: TEXT is missing"),
        (["generate", "m", "hi", "--capture", "z"], 2, "irkit: --capture needs --json"),
        (["run", "m", "hi", "--capture", '{"names": ', "--json"], 2, "irkit: --capture must be JSON"),
        (["serve", "--port", "65536"], 2, "irkit: --port must be less than or equal to 65535"),
        (["rm", "nosuch"], 1, "irkit: no model 'nosuch'"),
        (["add", "nosuch.gguf"], 1, "irkit: no file at 'nosuch.gguf'"),
        (["pull", "no such"], 2, "irkit: 'no such' cannot be pulled"),
        (["create", "m"], 2, "irkit: give either --from, or --file"),
        (["create", "m", "--from", "nosuch"], 1, "irkit: no model 'nosuch'"),
        (["create", "m", "--from", "x", "--parameter", "top_k"], 2, "irkit: --parameter must be KEY=VALUE"),
        (["create", "m", "--file", "nosuch"], 2, "irkit: nosuch cannot be read"),
        (["copy", "nosuch", "m"], 1, "irkit: no model 'nosuch'"),
        (["run", "m", "--temprature", "1"], 2, "irkit: No such option: --temprature"),
        (["run", "m", "hi", "--temperature"], 2, "irkit: Option '--temperature' requires an argument; irkit"),
        (["run"], 2, "irkit: Missing argument 'MODEL'; irkit run -h shows"),
        (["rnu", "m"], 2, "irkit: No such command 'rnu'. Did you mean 'run'?"),
        (["run", "m", "hi", "--image", "cat.png"], 2, "irkit: there is no --image: models read and write text here"),
        (["run", "m", "hi", "-n", "9"], 2, "irkit: there is no -n: --num-predict limits"),
        (["show", "m"], 2, "irkit: there is no show: info shows"),
    ],
    ids=lambda value: " ".join(value[:1] + value[3:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_an_exit_code(home, words, code, message):
    done = irkit_(*words)
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (code, "")


def test_without_a_command_there_is_help():
    done = irkit_()
    assert (done.returncode, done.stderr) == (0, "")
    assert irkit_("-h").stdout == done.stdout
    for name in ("run", "ps", "stop", "doctor"):
        assert re.search(rf"^  {name}  ", done.stdout, re.M)


def test_a_model_has_the_names_that_ollama_would_have_for_it(home, tiny_path):
    assert irkit_("add", tiny_path, "--name", "Me/Tiny:latest").stdout == "me/tiny\n"
    assert irkit_("copy", "registry.ollama.ai/me/tiny", "library/mine:1b").stdout == "mine:1b\n"
    assert irkit_("tokenize", "ollama.com/mine:1b", "he").stdout == irkit_("tokenize", tiny_path, "he").stdout != ""
    done = irkit_("run", "me/tny", "hi")
    assert (done.returncode, done.stderr.endswith("did you mean me/tiny?\n")) == (1, True)
    assert irkit_("rm", "registry.ollama.ai/me/tiny:latest").returncode == 0
    assert [model.name for model in hub.models()] == ["mine:1b"]


def test_models_are_added_listed_and_removed(home, model_path):
    assert irkit_("add", model_path, "--name", "mine").stdout == "mine\n"
    (model,) = json.loads(irkit_("list", "--json").stdout)
    assert (model["name"], model["path"], model["size"]) == ("mine", str(model_path), model_path.stat().st_size)
    table = irkit_("list").stdout.splitlines()
    assert table[0].split() == ["NAME", "SIZE", "PARAMETERS", "QUANTIZATION", "ADDED", "FROM"]
    assert table[1].split()[:3] == ["mine", "98", "MB"]
    assert irkit_("detokenize", "mine", *irkit_("tokenize", "mine", "Hi there").stdout.split()).stdout == "Hi there\n"
    removed = irkit_("rm", "mine")
    assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "")
    assert irkit_("list", "--json").stdout == "[]\n"
    assert model_path.is_file()


def test_models_are_created_of_others_and_copied(home, tiny_path, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.role[0] }}:{{ message.content }};{% endfor %}")
    own = ["--parameter", "temperature=0", "--parameter", "num_predict=3"]
    stop = ["--parameter", "stop=one", "--parameter", "stop=a b"]
    words = ["--from", tiny_path, "--template", template, "--system", "hello", *own, *stop]
    done = irkit_("create", "Mine:v1", *words)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine:v1\n", "")
    (made,) = json.loads(irkit_("list", "--json").stdout)
    assert (made["path"], made["system"], made["template"]) == (str(tiny_path), "hello", template.read_text())
    assert made["options"] == {"temperature": 0, "num_predict": 3, "stop": ["one", "a b"]}
    told = json.loads(irkit_("run", "mine:v1", "he", "--json").stdout)
    with Session(tiny_path) as tiny:
        expected = tiny.generate("s:hello;u:he;", temperature=0, num_predict=3)
        assert (told["text"], told["stats"]["tokens"], told["finish_reason"]) == (expected.text, 3, "length")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.gguf").symlink_to(tiny_path)
    modelfile = tmp_path / "folder" / "Modelfile"
    lines = "FROM ./file.gguf", "PARAMETER top_k 3", "PARAMETER stop one", 'SYSTEM """Be\nbrief."""', "LICENSE MIT"
    modelfile.write_text("\n".join(lines))
    assert irkit_("create", "second", "--file", modelfile).stdout == "second\n"
    assert irkit_("create", "third", "-f", modelfile, "--system", "", *own, *stop).stdout == "third\n"
    assert irkit_("create", "fourth", "--from", "second", "--parameter", "top_k=5").stdout == "fourth\n"
    models = {model["name"]: model for model in json.loads(irkit_("list", "--json").stdout)}
    assert {name: model["system"] for name, model in models.items()} == {
        "mine:v1": "hello", "second": "Be\nbrief.", "third": "", "fourth": "Be\nbrief.",
    }  # fmt: skip
    assert models["third"]["options"] == made["options"] | {"top_k": 3, "stop": ["one", "one", "a b"]}
    assert models["fourth"]["options"] == {"top_k": 5, "stop": ["one"]}
    assert {models[name]["license"] for name in ("second", "third", "fourth")} == {"MIT"}
    assert Path(models["second"]["path"]) == tmp_path / "folder" / "file.gguf"

    done = irkit_("copy", "mine:v1", "Copy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "copy\n", "")
    assert irkit_("rm", "mine:v1").returncode == 0
    models = {model["name"]: model for model in json.loads(irkit_("list", "--json").stdout)}
    assert models["copy"] == made | {"name": "copy", "added_at": models["copy"]["added_at"]}
    assert json.loads(irkit_("run", "copy", "he", "--json").stdout)["text"] == told["text"]


def test_info(model_path, session):
    shown = irkit_("info", model_path, "--num-ctx", "100", "--json").stdout
    assert json.loads(shown)["n_ctx"] == 100
    assert json.loads(shown)["d_model"] == session.info().d_model == 576


def test_verbs_print_bare_results(model_path, session):
    assert irkit_("tokenize", model_path, "one two").stdout == " ".join(map(str, session.tokenize("one two"))) + "\n"
    assert json.loads(irkit_("tokenize", model_path, "--json", given="[1, 2]").stdout) == session.tokenize("[1, 2]")
    rows = irkit_("embed", model_path, "one", "two").stdout.splitlines()
    assert [len(row.split()) for row in rows] == [576, 576]
    assert float(rows[0].split()[0]) == pytest.approx(float(session.embed("one")[0, 0]), abs=1e-4)


def test_run_puts_what_is_piped_in_before_the_prompt(model_path, session):
    options = {"temperature": 0, "num_predict": 12}
    done = irkit_("run", model_path, "Say it again.", "--temperature", 0, "--num-predict", 12, "--json", given="Hello.")
    told = json.loads(done.stdout)
    expected = session.respond("Hello.\nSay it again.", **options)
    assert (told["text"], told["stats"]["prompt_tokens"]) == (expected.text, expected.stats.prompt_tokens)
    assert told["finish_reason"] == expected.finish_reason
    assert done.stderr == ""


def test_respond_reads_a_conversation_and_generate_leaves_text_alone(model_path, session):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fruit."}]
    options = {"temperature": 0, "num_predict": 8, "stop": ("\n", "zzz"), "logit_bias": {28: -100.0}}
    words = [*("--temperature", 0, "--num-predict", 8), *("--stop", "\n", "--stop", "zzz", "--logit-bias", "28=-100")]
    done = irkit_("respond", model_path, json.dumps(messages), *words, "--verbose")
    assert done.stdout == session.respond(messages, **options).text + "\n"
    backend, speed = done.stderr.splitlines()
    assert backend == session.info().backend
    assert re.fullmatch(r"\d+ tokens read in [\d.]+ s, \d made, [\d.]+ a second", speed)
    text = '[{"role": "user"'
    assert irkit_("generate", model_path, text, *words).stdout == session.generate(text, **options).text + "\n"


def test_what_a_form_takes_is_a_part_of_what_runs(tiny_path):
    words = ["run", tiny_path, "hello", "--num-predict", 4, "--temperature", 0, "--verbose"]
    speed = r"\d+ tokens read in [\d.]+ s, \d made, [\d.]+ a second"
    assert re.fullmatch(speed, irkit_(*words).stderr.splitlines()[-1])
    done = irkit_(*words, "--format", "json", "--json")
    line = re.fullmatch(rf"{speed}, the form took ([\d.]+) ms a token", done.stderr.splitlines()[-1])
    assert line
    stats = json.loads(done.stdout)["stats"]
    assert float(line[1]) == pytest.approx(1000 * stats["form_seconds"] / stats["tokens"], abs=0.01)


def test_trace_prints_what_there_is_or_numbers_or_an_error(tiny_path):
    with Session(tiny_path) as tiny:
        expected = tiny.trace("hello", names=("pattern", "resid_post"), layers=(0, -1))
    words = ["trace", tiny_path, "hello", "--names", "pattern,resid_post", "--layers", "0,-1"]
    first, pattern, stream, logits = irkit_(*words).stdout.splitlines()
    assert first.startswith("4 tokens, 4 arrays, ")
    assert re.fullmatch(r"attn.hook_pattern +layers 0-1 +\[1, 4, 4, 4\] +entropy [\d.]+ nats", pattern)
    norm = np.mean(np.linalg.norm(expected["resid_post"], axis=-1))
    assert stream.split() == ["hook_resid_post", "layers", "0-1", "[1,", "4,", "64]", "norm", f"{norm:.3g}"]
    assert logits.split() == ["logits", "[1,", "4,", "258]"]
    told = json.loads(irkit_(*words, "--json", "--logits", "none").stdout)
    assert told["arrays"].keys() == set(expected)
    assert np.allclose(told["arrays"]["blocks.1.attn.hook_pattern"]["values"], expected["pattern", 1], atol=1e-5)
    done = irkit_(*words, "--budget", 1000)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the budget is 1 kB" in done.stderr
    large = irkit_("trace", tiny_path, "a" * 400, "--names", "pattern", "--json")
    assert (large.returncode, large.stdout) == (1, "")
    assert "JSON holds at most 1,000,000" in large.stderr
    assert "--output" in large.stderr


def test_trace_keeps_a_file(tiny_path, tmp_path):
    pytest.importorskip("irkit.tracefile")
    path = tmp_path / "trace.safetensors"
    done = irkit_("trace", tiny_path, "hello", "--names", "z", "-o", path)
    assert (done.returncode, done.stdout) == (0, "")
    assert "2 arrays" in done.stderr
    assert irkit.load_trace(path)["z", 1].shape == (1, 4, 4, 16)  # pyright: ignore[reportAttributeAccessIssue]


def test_lens_is_a_table_and_estimate_a_list(tiny_path):
    with Session(tiny_path) as tiny:
        lens, estimate = tiny.lens("hello", k=2), tiny.estimate("hello", names="z")
    assert irkit_("lens", tiny_path, given="hello").stdout == str(lens) + "\n"
    heading, last, first = str(lens).splitlines()
    assert heading.split() == ["'he'", "'l'", "'l'", "'o'"]
    assert last.startswith(f"1 {lens.strings[1][0][0]!r} {100 * np.exp(lens.logprobs[1, 0, 0]):.0f}")
    assert first.startswith("0 ")
    told = json.loads(irkit_("lens", tiny_path, "hello", "--k", 2, "--json").stdout)
    assert told["strings"] == [[list(place) for place in layer] for layer in lens.strings]
    told = json.loads(irkit_("estimate", tiny_path, "hello", "--names", "z", "--json").stdout)
    assert (told["nbytes"], told["fits"]) == (estimate.nbytes, True)


def test_the_lens_fits_the_terminal(tiny_path):
    terminal = Terminal("lens", str(tiny_path), "a" * 40, "--layers", "1")
    lines = terminal.rest().replace("\r", "").splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 100
    assert sum(line.count("'a'") for line in lines if not line.startswith("1 ")) == 40
    assert terminal.close() == 0


def test_no_color_means_none(tiny_path):
    """What stands out by its weight may stay: https://no-color.org asks about colours."""
    sent, text = {}, "abcdefghijklmnopqrstuvwxyz0123456789"  # some of it likely to this model
    for no_color in ("", "1"):
        terminal = Terminal("lens", str(tiny_path), text, "--k", "1", NO_COLOR=no_color, COLORTERM="truecolor")
        terminal.rest()
        assert terminal.close() == 0
        sent[no_color] = {code for code in terminal.codes if re.search(r"[\[;](3[0-8]|4[0-8]|9[0-7])[;m]", code)}
    assert not sent["1"]
    assert any("32" in code for code in sent[""])  # the likeliest are green


def test_edits_and_captures_of_an_answer(tiny_path):
    words = ["generate", tiny_path, "hello", "--temperature", 0, "--num-predict", 2, "--json"]
    edits = ["--edits", '[{"op": "scale", "name": "resid_post", "factor": 0, "layers": 1}]']
    done = irkit_(*words, "--edits", edits[1].replace("}", ', "heads": 0}'))
    assert (done.returncode, done.stderr) == (2, "irkit: heads: hook_resid_post has no heads\n")
    plain, changed = (json.loads(irkit_(*words, *more).stdout) for more in ([], edits))
    assert plain["tokens"][0]["logprob"] != changed["tokens"][0]["logprob"]
    assert changed["tokens"][0]["logprob"] == pytest.approx(-np.log(258), abs=1e-3)
    for capture in ("z,pattern", '{"names": ["z", "pattern"]}'):
        told = json.loads(irkit_(*words, "--capture", capture).stdout)
        assert [len(token["captures"]["arrays"]) for token in told["tokens"]] == [4, 4]
    assert "captures" not in plain["tokens"][0]


@pytest.fixture
def answering(model_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun a long answer."""
    words = ["run", str(model_path), "Count to one thousand.", "--num-predict", "3000", "--temperature", "0"]
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen([*IRKIT, *words], stdin=nothing, stdout=pipe, stderr=pipe) as process:
        assert process.stdout
        assert process.stdout.read(1)
        yield process
        process.kill()


def test_ctrl_c_ends_a_single_answer_with_130(answering):
    answering.send_signal(signal.SIGINT)
    assert answering.wait(30) == 130
    assert answering.stderr.read() == b""


# Ctrl-C as soon as this module is about to be imported.
CTRL_C_AT_IMPORT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[-1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["list", sys.argv[-1]]
from irkit.cli import main
main()
"""


@pytest.mark.parametrize("module", ["irkit.cli.commands", "typer", "numpy", "irkit.session", "pydantic"])
def test_ctrl_c_while_irkit_starts_is_no_traceback(module):
    done = subprocess.run([sys.executable, "-c", CTRL_C_AT_IMPORT, module], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, b"", b"")


def test_a_reader_that_goes_away_ends_it_as_it_ends_others(answering):
    answering.stdout.close()
    assert answering.wait(30) == -signal.SIGPIPE
    assert answering.stderr.read() == b""


def test_bytes_that_are_no_text(model_path):
    assert (
        irkit_("tokenize", model_path, given=b"\xff").stderr
        == "irkit: standard input must be UTF-8 text; byte 0 is not\n"
    )
    done = subprocess.run([*IRKIT, "tokenize", str(model_path), b"\xff"], capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"irkit: TEXT must be UTF-8 text\n")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *words: str, **variables: str) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"} | variables
        self.codes: set[str] = set()
        """The escape sequences that were sent, without their numbers' meaning."""
        self.process = subprocess.Popen(
            [*IN_TERMINAL, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def enter(self, text: str, prompt: str = ">>>") -> None:
        """Types a line at the prompt, which is then shown with it once more."""
        self.expect(re.escape(prompt))
        self.type(text + "\r")
        self.expect(re.escape(f"{prompt} {text}") + r"\r+\n")

    def expect(self, pattern: str, seconds: float = 120) -> str:
        """Waits until `pattern` appears; returns what was shown up to its end, and takes it away."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, f"{pattern!r} is not in {self.shown!r}"
            self._read()
        before, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return before

    def _read(self) -> None:
        if select.select([self._ours], [], [], 0.1)[0]:
            text = os.read(self._ours, 65536).decode(errors="replace")
            self.codes |= set(re.findall(r"\x1b\[[0-9;]*m", text))
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]", "", text)

    def rest(self) -> str:
        """Everything shown until the command ends."""
        deadline = time.monotonic() + 120
        with contextlib.suppress(OSError):  # so a terminal ends
            while time.monotonic() < deadline:
                self._read()
        return self.shown

    def close(self) -> int:
        code = self.process.wait(30)
        os.close(self._ours)
        return code


@pytest.fixture
def small_terminal(home: Path, tiny_path: Path) -> Iterator[Terminal]:
    """A prompt loop that answers with two tokens, and whose history holds a command."""
    (home / "history").write_text("\n# 2026-11-24 00:00:00\n+/help\n")
    terminal = Terminal("run", str(tiny_path), "--num-predict", "2", "--verbose")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


def test_the_history_is_kept_and_a_paste_of_several_lines_is_one_message(small_terminal):
    small_terminal.expect(">>>")
    small_terminal.type("\x1b[A\r")  # up: what was typed before, in another loop
    small_terminal.expect("Ctrl-C")
    small_terminal.expect(">>>")
    small_terminal.type("\x1b[200~/nope\nand more\x1b[201~")
    small_terminal.expect("and more")
    small_terminal.type("\r")
    small_terminal.expect(r">>> /nope\r+\nand more\r+\n")  # the message, written once more as it is sent
    shown = small_terminal.expect(">>>")
    assert "no command" not in shown  # which the first line alone would be
    small_terminal.type("\x04")
    assert small_terminal.close() == 0


@pytest.fixture
def terminal(home: Path, model_path: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A prompt loop whose answers have at most so many tokens as the test's parameter says."""
    options = ["--temperature", "0", "--num-predict", str(request.param), "--system", "You count."]
    terminal = Terminal("run", str(model_path), *options)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


@pytest.fixture
def address(model_path: Path) -> Iterator[str]:
    """Where the model's file can be fetched from, on this machine."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=model_path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/{model_path.name}"
        server.shutdown()


def test_pulling_shows_its_progress_on_a_terminal_only(home, address, model_path):
    name = clean_name(model_path.stem)
    terminal = Terminal("pull", address)
    terminal.expect(f"{name} from 127.0.0.1")
    terminal.expect(r"98\.4/98\.4 MB")
    terminal.expect(rf"\n{re.escape(name)}\r\n")
    assert terminal.close() == 0
    assert irkit_("rm", name).returncode == 0
    done = irkit_("pull", address)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name}\n", "")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("detok", ["detokenize"]),
        ("run x --prec", ["--precision"]),
        ("run x --precision e", ["exact"]),
        ("run smol", ["smollm2", "smolly"]),
        ("stop smoll", ["smollm2", "smolly"]),
        ("trace smolly --red", ["--reduce"]),
    ],
)
def test_bash_completes_commands_models_options_and_choices(home, tiny_path, tmp_path, words, offered):
    """By the script that `irkit --show-completion bash` prints, in a bash of its own."""
    hub.add(tiny_path, "smolly")
    program = tmp_path / "irkit"
    program.write_text(f"#!{sys.executable}\nfrom irkit.cli import main\nmain()\n")
    program.chmod(0o700)
    given = f"COMP_WORDS=(irkit {words}); COMP_CWORD={len(words.split())}"
    script = f'eval "$(irkit --show-completion bash)"; {given}; _irkit_completion irkit; echo "${{COMPREPLY[@]}}"'
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize("terminal", [6], indirect=True)
def test_the_prompt_loop(terminal, home, session):
    messages = [{"role": "system", "content": "You count."}]

    def answer(text: str) -> list[str]:
        messages.append({"role": "user", "content": text})
        reply = session.respond(messages, temperature=0, num_predict=6).text
        messages.append({"role": "assistant", "content": reply})
        return reply.split()

    assert session.info().backend in terminal.expect("\n")
    for text in ("My name is Ada.", "What is my name?"):
        terminal.enter(text)
        assert terminal.expect("(?=>>>)").split() == answer(text)

    terminal.enter("/help")
    assert "/reset" in terminal.expect("Ctrl-C")
    terminal.enter("/nope")
    terminal.expect("no command /nope")
    terminal.enter("/reset")
    terminal.expect("forgotten[^>]*")
    del messages[1:]

    terminal.enter('"""Say')
    terminal.enter('hi."""', prompt="...")
    assert terminal.expect("(?=>>>)").split() == answer("Say\nhi.")

    terminal.enter("/bye")
    assert terminal.close() == 0
    history = home / "history"
    assert "+What is my name?" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("terminal", [3000], indirect=True)
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves_the_loop(terminal):
    terminal.enter("Count from one to one hundred.")
    terminal.expect(r"\w+")
    terminal.type("\x03")
    terminal.expect(r"\n(?=>>>)", seconds=10)
    terminal.expect(">>>")
    terminal.type("\x03")
    terminal.expect("/exit leaves[^>]*>>>")
    terminal.type("\x04")
    assert terminal.close() == 0


@pytest.mark.parametrize("terminal", [40], indirect=True)
def test_what_is_typed_during_an_answer_waits_for_its_end(terminal):
    terminal.enter("Count from one to one hundred.")
    terminal.expect(r"\w+")
    terminal.type("/help\r\x04")
    answer = terminal.expect(">>> /help")
    assert "/help" not in answer.removesuffix(">>> /help")  # nothing stands among the words of the answer
    assert "Ctrl-C" in terminal.rest()
    assert terminal.close() == 0


def test_without_a_terminal_there_is_no_prompt_loop(model_path):
    done = irkit_("chat", model_path)
    assert (done.returncode, done.stderr) == (2, "irkit: a prompt loop needs a terminal\n")


class Shown(io.StringIO):
    """What a terminal was sent."""

    def isatty(self) -> bool:
        return True


def test_waiting_long_is_shown_and_taken_away(monkeypatch):
    monkeypatch.setattr(sys, "stderr", shown := Shown())
    done = Future[int]()
    threading.Timer(0.7, done.set_result, [7]).start()
    assert wait(done, "loading m", lambda: 0.25) == 7
    assert re.fullmatch(r"\rloading m \[#{5} {15}\]  25%\r +\r", shown.getvalue())
    quick, failed = Future[int](), Future[int]()
    quick.set_result(8)
    failed.set_exception(irkit.IrkitError("no"))
    monkeypatch.setattr(sys, "stderr", shown := Shown())
    assert wait(quick, "loading m", float) == 8
    with pytest.raises(irkit.IrkitError, match=r"^no$"):
        wait(failed, "loading m", float)
    assert shown.getvalue() == ""
