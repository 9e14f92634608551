"""The commands: one for each verb of a `Session`, and those for running, serving and keeping models."""

import contextlib
import functools
import inspect
import json
import re
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
from irkit.cli import hints, remote
from irkit.cli.terminal import ctrl_c_raises, end_as_by_sigpipe, is_terminal, printable, progress_bar, say, wait
from irkit.cli.words import convert, declare, label
from irkit.errors import OptionError
from irkit.hub import stores
from irkit.options import BenchOptions, GenerateOptions, ServeOptions, parse
from irkit.results import Generation, columns
from irkit.session import Session
from irkit.trace import Trace, size
from irkit.verbs import REQUIRED, Parameter, Verb, load_parameters, option_parameters, verbs

WITHOUT_COMMAND = {"reset", "close"}
"""Verbs that change a session, which here ends with its command."""

_OWN = frozenset(GenerateOptions.model_fields)
"""Options that a model may have its own values of, where a command leaves them out."""

app = typer.Typer(
    help=irkit.__doc__,
    rich_markup_mode=None,  # importing rich takes longer than printing the help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Newer versions of Typer raise a copy of click's errors, of which they show this one alone.
_UsageError: Any = typer.BadParameter.__base__

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Say on stderr what runs, and how fast.")]
Prompt = Annotated[str | None, typer.Argument(help="What to ask; without it, a prompt loop opens.", metavar="PROMPT")]


def _model_names(incomplete: str) -> list[str]:
    return [name for name in hub.names() if name.startswith(incomplete)]


Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Keep the trace in this file, as safetensors.", metavar="FILE"),
]
Models = Annotated[list[str], typer.Argument(help="Names of models, or paths.", metavar="MODEL")]
Running = Annotated[list[str], typer.Argument(help="Names of models.", metavar="MODEL", autocompletion=_model_names)]
Name = Annotated[str, typer.Argument(help="The name of a model.", metavar="NAME", autocompletion=_model_names)]

_Function = Callable[..., None]


def _command(name: str, parameters: Sequence[inspect.Parameter] = ()) -> Callable[[_Function], _Function]:
    """Adds a function as a command; Typer reads `parameters`, where they are given, as its signature."""

    def add(function: _Function) -> _Function:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            if context := given.pop("context", None):
                # What was left out is the model's own to set, if it has been made with options.
                given = {
                    n: v for n, v in given.items() if n not in _OWN or context.get_parameter_source(n).name != "DEFAULT"
                }
            try:
                function(**given)
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except BrokenPipeError:
                end_as_by_sigpipe()

        if parameters:
            context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
            signature = inspect.Signature([context, *parameters])
            command.__signature__ = signature  # pyright: ignore[reportAttributeAccessIssue]
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


@app.callback(invoke_without_command=True)
def _irkit(context: typer.Context, version: Version = False) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def run() -> int:
    """Run the command that `sys.argv` names; its exit code.

    Raises:
        OptionError: a mistake in the command.
        IrkitError: what it could not do.
    """
    try:
        return app(prog_name="irkit", standalone_mode=False) or 0
    except _UsageError as error:
        raise OptionError(_explained(error)) from None


def _explained(error: Any) -> str:
    """One line for what the parser says: with what another program means by the word, or where to read more."""
    message, path = error.format_message(), error.ctx.command_path if error.ctx else "irkit"
    quoted = re.search("'(.*?)'", message)
    option, command = getattr(error, "option_name", None), quoted[1] if quoted and path == "irkit" else None
    hint = hints.for_option(option) if option else hints.for_command(command) if command else None
    if hint:
        return f"there is no {option or command}: {hint}"
    return f"{message.removesuffix('.')}; {path} -h shows what there is"


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


@_command("ps")
def _ps(in_json: Json = False) -> None:
    """List the models that a running server holds."""
    models = remote.running()
    if in_json:
        print(json.dumps(models, ensure_ascii=False))
        return
    rows = [["NAME", "SIZE", "CONTEXT", "UNTIL"]]
    for m in models:
        held = size(m["size"]) if isinstance(m.get("size"), int) else ""
        rows.append([str(m["name"]), held, str(m.get("context_length", "")), remote.until(m.get("expires_at"))])
    _print_table(rows)


@_command("stop")
def _stop(models: Running) -> None:
    """Have a running server let go of models, and cancel what it makes with them."""
    for model in models:
        remote.stop(model)


@_command("doctor")
def _doctor(in_json: Json = False) -> None:
    """Look at everything irkit needs here, and say what is wrong and how to mend it; then the exit code is 1."""
    from irkit.cli import doctor

    broken, found = False, []
    for check in doctor.examine():
        broken |= check.status == "broken"
        found.append(asdict(check))
        if not in_json:
            print(printable(f"{check.status:<7} {check.name:<12} {check.found}"))
            if check.mend:
                print(f"{'':20} -> {check.mend}")
    if in_json:
        print(json.dumps(found, ensure_ascii=False))
    raise typer.Exit(int(broken))


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
    models, others = hub.models(), (found for folder in stores.folders() for found in stores.examine(folder))
    if damaged := sum(isinstance(found, stores.Damaged) for found in others):
        say(f"irkit: {damaged} of other programs cannot be read; irkit doctor says why")
    if in_json:
        print(json.dumps([asdict(model) for model in models], ensure_ascii=False, default=str))
        return
    rows = [("NAME", "SIZE", "PARAMETERS", "QUANTIZATION", "ADDED", "FROM")]
    for m in models:
        size, parameters = f"{m.size / 1e6:,.0f} MB", f"{m.parameters / 1e6:,.0f} M"
        rows.append((m.name, size, parameters, m.quantization, f"{m.added_at:%Y-%m-%d}", m.source or m.path.name))
    _print_table(rows)


@_command("pull")
def _pull(name: Annotated[str, typer.Argument(help="What to fetch.", metavar="NAME")]) -> None:
    """Fetch a model."""
    with progress_bar() as show:
        manifest = hub.pull(name, progress=show, allow_private=True)
    print(manifest.name)


@_command("add")
def _add(
    file: Annotated[Path, typer.Argument(help="A GGUF file, which stays where it is.", metavar="FILE")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; if not given, as its file.")] = None,
) -> None:
    """Register a model file under a name."""
    print(hub.add(file, name).name)


@_command("create")
def _create(
    name: Annotated[str, typer.Argument(help="What to call it.", metavar="NAME")],
    source: Annotated[str | None, typer.Option("--from", help="A GGUF file, or a model.", metavar="MODEL")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A Modelfile that says all.", metavar="FILE")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="A file with a chat template.", metavar="FILE")] = None,
    system: Annotated[str | None, typer.Option(help="What it is told before a conversation.")] = None,
    parameter: Annotated[list[str], typer.Option(help="An option of its own.", metavar="KEY=VALUE")] = [],  # noqa: B006
) -> None:
    """Make a model of another: its file, with a template, a system prompt and options."""
    if (source is None) == (file is None):
        raise OptionError("give either --from, or --file")
    told = hub.read_modelfile(_text_of(file)) if file else hub.Modelfile(source or "", None, None, {}, None)
    options = dict(told.options)
    for word in parameter:
        key, equals, value = word.partition("=")
        if not equals:
            raise OptionError(f"--parameter must be KEY=VALUE, got {word!r}")
        options[key] = [*options.get("stop", ()), value] if key == "stop" else value
    beside = file.parent / Path(told.source).expanduser() if file else None
    made = hub.create(
        name,
        beside if beside and beside.is_file() else told.source,
        template=_text_of(template) if template else told.template,
        system=told.system if system is None else system,
        options=options,
        license=told.license,
    )
    print(made.name)


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise OptionError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"{file} must be UTF-8 text; byte {error.start} is not") from None


@_command("copy")
def _copy(source: Name, name: Annotated[str, typer.Argument(help="What to call it too.", metavar="NEW")]) -> None:
    """Give a model another name; both share its file."""
    print(hub.copy(source, name).name)


@_command("rm")
def _rm(name: Name) -> None:
    """Remove a model; a file that irkit did not fetch itself stays."""
    hub.remove(name)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    for row in columns(rows):
        print(printable("  ".join(row).rstrip()))


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
        if parameter.name in _OWN and parameter.name not in given:
            continue
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
    generation = ask()  # the prompt is laid out and tokenized meanwhile
    try:
        if verbose or is_terminal(sys.stderr):
            wait(session.model.load(), f"loading {session.name}", lambda: session.model.progress)
            say(session.info().backend)
        if in_json:
            _show(generation, in_json)
        else:
            for text in generation.texts():
                print(text, end="", flush=True)
            print()
        if verbose:
            stats = generation.stats
            form = 1000 * stats.form_seconds / max(stats.tokens, 1)
            say(
                f"{stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, "
                f"{stats.tokens} made, {stats.tokens_per_second:.1f} a second"
                + (f", the form took {form:.2f} ms a token" if stats.form_seconds else "")
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
