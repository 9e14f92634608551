"""The commands: one for each verb of a `Session`, and those for running, serving and keeping models."""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import irkit
from irkit import hub
from irkit.analysis.lens import LogitLens
from irkit.as_json import as_json
from irkit.cli.terminal import ctrl_c_raises, is_terminal, printable, progress_bar, say
from irkit.cli.words import convert, declare, label
from irkit.errors import OptionError
from irkit.options import BenchOptions, ServeOptions, parse
from irkit.results import Generation
from irkit.session import Session
from irkit.trace import Trace, size
from irkit.verbs import REQUIRED, Parameter, Verb, load_parameters, option_parameters, verbs

WITHOUT_COMMAND = {"reset", "close"}
"""Verbs that change a session, which here ends with its command."""

app = typer.Typer(
    help=irkit.__doc__,
    no_args_is_help=True,
    rich_markup_mode=None,  # importing rich takes longer than printing the help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say on stderr what runs, and how fast.")]
Prompt = Annotated[str | None, typer.Argument(help="What to ask; without it, a prompt loop opens.", metavar="PROMPT")]


def _model_names(incomplete: str) -> list[str]:
    return [model.name for model in hub.models() if model.name.startswith(incomplete)]


Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Keep the trace in this file, as safetensors.", metavar="FILE"),
]
Models = Annotated[list[str], typer.Argument(help="Names of models, or paths.", metavar="MODEL")]
Name = Annotated[str, typer.Argument(help="The name of a model.", metavar="NAME", autocompletion=_model_names)]

_Function = Callable[..., None]


def _command(name: str, parameters: Sequence[inspect.Parameter] = ()) -> Callable[[_Function], _Function]:
    """Adds a function as a command; Typer reads `parameters`, where they are given, as its signature."""

    def add(function: _Function) -> _Function:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            try:
                function(**given)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None

        if parameters:
            command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        app.command(name)(command)
        return function

    return add


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


_MODEL, *_HOW = load_parameters()
_SYSTEM = next(p for p in verbs()["chat"].parameters if p.name == "system")
_PROMPT = next(p for p in verbs()["generate"].parameters if p.name == "prompt")
_ANSWER = [p for p in verbs()["respond"].parameters if p.option]
_SEEN = [p for p in verbs()["respond"].parameters if p.name in ("capture", "edits")]
_IN_JSON, _VERBOSE = _parameter("in_json", Json, False), _parameter("verbose", Verbose, False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"irkit {irkit.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)]


@app.callback()
def _irkit(version: Version = False) -> None: ...


@_command(
    "run",
    [
        declare(_MODEL, _model_names),
        _parameter("prompt", Prompt, None),
        *map(declare, [_SYSTEM, *_SEEN, *_ANSWER, *_HOW]),
        _IN_JSON,
        _VERBOSE,
    ],
)
def _run(prompt: str | None, in_json: bool, verbose: bool, **given: Any) -> None:
    """Ask a model once, or talk to it in a prompt loop."""
    text = "\n".join(part for part in (_piped(), prompt and convert(_PROMPT, prompt)) if part)
    system = convert(_SYSTEM, given["system"])
    options, seen = _values(_ANSWER, given), _values(_SEEN, given)
    _check_shown(seen, in_json)
    if not text and not is_terminal(sys.stdin):
        raise OptionError("there is no prompt: give one after the model's name, or pipe one in")
    with _session(given) as session:
        if text:
            opening = [{"role": "system", "content": system}] if system else []
            messages = [*opening, {"role": "user", "content": text}]
            _answer(session, lambda: session.respond(messages, **seen, **options), in_json, verbose)
        else:
            changed = session.hooks(edits=seen["edits"]) if seen["edits"] else contextlib.nullcontext()
            with ctrl_c_raises(), changed:
                session.chat(system, **options)


@_command("serve", [declare(p) for p in option_parameters(ServeOptions)])
def _serve(**given: Any) -> None:
    """Serve models over HTTP, as Ollama does, until Ctrl-C."""
    from irkit.server import serve

    with ctrl_c_raises():
        serve(parse(ServeOptions, _values(option_parameters(ServeOptions), given)))


@_command(
    "bench", [_parameter("models", Models, ["smollm2"]), *map(declare, option_parameters(BenchOptions)), _IN_JSON]
)
def _bench(models: list[str], in_json: bool, **given: Any) -> None:
    """Measure how fast models run here, how much of the memory's speed that uses, and how another engine does."""
    from irkit import bench

    options = parse(BenchOptions, _values(option_parameters(BenchOptions), given))
    with progress_bar() as show:
        for model in models:
            hub.ensure(model, progress=show)
    with ctrl_c_raises():
        reports = [bench.bench(model, options, say) for model in models]
    if in_json:
        print(json.dumps([report.as_json() for report in reports], ensure_ascii=False))
        return
    from rich.console import Console

    for report in reports:
        Console().print(bench.as_table(report))


@_command("list")
def _list(in_json: Json = False) -> None:
    """List the models on this machine."""
    models = hub.models()
    if in_json:
        print(json.dumps([asdict(model) for model in models], ensure_ascii=False, default=str))
        return
    rows = [("NAME", "SIZE", "PARAMETERS", "QUANTIZATION", "ADDED")]
    for m in models:
        size, parameters = f"{m.size / 1e6:,.0f} MB", f"{m.parameters / 1e6:,.0f} M"
        rows.append((m.name, size, parameters, m.quantization, f"{m.added_at:%Y-%m-%d}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@_command("pull")
def _pull(name: Annotated[str, typer.Argument(help="What to fetch.", metavar="NAME")]) -> None:
    """Fetch a model."""
    with progress_bar() as show:
        manifest = hub.pull(name, progress=show)
    print(manifest.name)


@_command("add")
def _add(
    file: Annotated[Path, typer.Argument(help="A GGUF file, which stays where it is.", metavar="FILE")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; if not given, as its file.")] = None,
) -> None:
    """Register a model file under a name."""
    print(hub.add(file, name).name)


@_command("rm")
def _rm(name: Name) -> None:
    """Remove a model; a file that irkit did not fetch itself stays."""
    hub.remove(name)


def _add_verb(verb: Verb) -> None:
    """Adds the command of `verb`."""
    extras = [_IN_JSON] * (verb.result is not None) + [_VERBOSE] * verb.streams
    extras += [_parameter("output", Output, None)] * (verb.result is Trace)
    parameters = [declare(_MODEL, _model_names), *map(declare, [*verb.parameters, *_HOW])]

    def function(in_json: bool = False, verbose: bool = False, output: Path | None = None, **given: Any) -> None:
        arguments = _values(verb.parameters, given)
        _check_shown(arguments, in_json)
        if output and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise OptionError(f"--output: no file can be made at '{output}'")
        with _session(given) as session:
            call = functools.partial(getattr(session, verb.name), **arguments)
            if verb.streams:
                _answer(session, call, in_json, verbose)
            elif verb.result is None:
                with ctrl_c_raises():  # it is a conversation
                    call()
            elif output:
                _keep(call(), output)
            else:
                _show(call(), in_json)

    function.__doc__ = verb.summary
    _command(verb.name, [*parameters, *extras])(function)


for _verb in verbs().values():
    if _verb.name not in WITHOUT_COMMAND:
        _add_verb(_verb)


def _values(parameters: Sequence[Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """The values of `parameters`; an argument that was left out is read from standard input."""
    values = {}
    for parameter in parameters:
        words = given[parameter.name]
        if words is None and parameter.default is REQUIRED:
            words = _piped()
            if words is None:
                raise OptionError(f"{label(parameter)} is missing")
        values[parameter.name] = convert(parameter, words)
    return values


def _piped() -> str | None:
    """What is piped into standard input; None if that is a terminal, or nothing."""
    if sys.stdin is None or is_terminal(sys.stdin):
        return None
    try:
        return sys.stdin.buffer.read().decode() or None
    except UnicodeDecodeError as error:
        raise OptionError(f"standard input must be UTF-8 text; byte {error.start} is not") from None


@contextmanager
def _session(given: dict[str, Any]) -> Iterator[Session]:
    """A session of the model in `given`, fetched if need be, with the load options in `given`."""
    values = _values([_MODEL, *_HOW], given)
    with progress_bar() as show:
        hub.ensure(values["model"], progress=show)
    with Session(**values) as session:
        yield session


def _answer(session: Session, ask: Callable[[], Generation], in_json: bool, verbose: bool) -> None:
    """Prints an answer as it is made, and on stderr what makes it."""
    session.model.load()
    # The backend is known when the weights are loaded: until then, the prompt is laid out and tokenized.
    info = session.model.submit(session.info) if verbose or is_terminal(sys.stderr) else None
    generation = ask()
    try:
        if info:
            say(info.result().backend)
        if in_json:
            _show(generation, in_json)
        else:
            for text in generation.texts():
                print(text, end="", flush=True)
            print()
        if verbose:
            stats = generation.stats
            say(
                f"{stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, "
                f"{stats.tokens} made, {stats.tokens_per_second:.1f} a second"
            )
    finally:
        generation.cancel()


def _check_shown(given: Mapping[str, Any], in_json: bool) -> None:
    if given.get("capture") is not None and not in_json:
        raise OptionError("--capture needs --json, where each token shows what was captured")


def _keep(trace: Trace, output: Path) -> None:
    trace.save(output)
    say(f"{len(trace)} arrays, {size(trace.nbytes)}, in {output}")


def _show(result: Any, in_json: bool) -> None:
    """Prints what a verb returned: ids and vectors as numbers between spaces, one vector a line."""
    if not in_json and isinstance(result, Trace | LogitLens):
        from irkit.cli import tables

        if isinstance(result, LogitLens):
            tables.show_lens(result)
        else:
            print(tables.summary(result))
        return
    plain = as_json(result)
    if in_json:
        print(json.dumps(plain, ensure_ascii=False))
    elif isinstance(plain, list):
        for row in plain if plain and isinstance(plain[0], list) else [plain]:
            print(*row)
    elif result is not None:
        print(result if isinstance(result, str) else printable(str(result), keep="\n"))
