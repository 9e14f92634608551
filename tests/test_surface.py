"""One definition, many surfaces: what Python, the command line and HTTP say of each option is the same."""

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest
from ipywidgets import Layout
from typer.main import get_command

from irkit.cli import commands
from irkit.cli.words import convert, label
from irkit.errors import OptionError
from irkit.options import GenerateOptions, ServeOptions
from irkit.server import create_app
from irkit.server.app import WITHOUT_ROUTE
from irkit.session import Session
from irkit.verbs import REQUIRED, Parameter, load_parameters, option_parameters, verbs
from irkit.widgets import controls

# Options that are no number, choice or list of texts: a notebook's user sets them in Python.
NO_CONTROL = {"logit_bias", "format"}
# Verbs whose route has Ollama's shape: their options are fields of an object in the body.
OPENAI_ROUTES = [
    ("respond", "/v1/chat/completions"),
    ("generate", "/v1/completions"),
    ("embed", "/v1/embeddings"),
]
OLLAMA_ROUTES = {"generate": "/api/generate", "respond": "/api/chat", "embed": "/api/embed"}


def cases(names: set[str]) -> list[Any]:
    """Every parameter of these verbs and of opening their model, each a case of its own."""
    return [
        pytest.param(name, parameter, id=f"{name}-{parameter.name}")
        for name in sorted(names)
        for parameter in (*verbs()[name].parameters, *load_parameters())
    ]


OPTIONS = [case for case in cases(set(verbs())) if case.values[1].option]


@pytest.fixture(scope="module")
def words() -> dict[str, dict[str, Any]]:
    """Parameters of each command by name, as the parser of the command line has them."""
    group: Any = get_command(commands.app)
    return {name: {p.name: p for p in command.params} for name, command in group.commands.items()}


@pytest.fixture(scope="module")
def paths() -> dict[str, Any]:
    return create_app().openapi()["paths"]


def body(paths: dict[str, Any], path: str) -> dict[str, Any]:
    content = paths[path]["post"]["requestBody"]["content"]
    return content["application/json"]["schema"]["properties"]


def with_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    """The part of `schema` that is not null."""
    return next((part for part in schema.get("anyOf", ()) if part != {"type": "null"}), schema)


def test_verbs_are_the_public_methods_of_session():
    methods = [name for name, value in vars(Session).items() if inspect.isfunction(value) and name[0] != "_"]
    for_programs = {"run_with_cache", "run_with_hooks", "hooks"}
    assert list(verbs()) == [name for name in methods if not hasattr(getattr(Session, name), "__python_only__")]
    assert for_programs <= set(methods) - set(verbs())
    assert {
        "generate",
        "respond",
        "tokenize",
        "detokenize",
        "score",
        "embed",
        "trace",
        "estimate",
        "lens",
        "info",
    } <= set(verbs())
    assert all(verb.summary.endswith(".") for verb in verbs().values())


def test_every_verb_has_a_command_and_a_route_or_a_reason_not_to(words, paths):
    assert set(verbs()) - set(words) == commands.WITHOUT_COMMAND == {"reset", "close"}
    assert {name for name in verbs() if f"/api/{name}" not in paths} == set()
    assert {"chat", "close", "generate", "embed"} == WITHOUT_ROUTE


@pytest.mark.parametrize(("verb", "parameter"), cases(set(verbs()) - commands.WITHOUT_COMMAND))
def test_command_line_says_the_same(verb, parameter, words):
    found = words[verb][parameter.name]
    assert found.help.startswith(parameter.help)
    assert found.help or not parameter.option
    if parameter.default is REQUIRED:
        assert found.metavar == label(parameter) == parameter.name.upper()
        return
    assert found.opts == [label(parameter)] == [f"--{parameter.name.replace('_', '-')}"]
    assert convert(parameter, found.default) == parameter.default
    if parameter.minimum is not None:
        assert found.metavar == f"{parameter.minimum}..{parameter.maximum}"


@pytest.mark.parametrize(("verb", "parameter"), cases(set(verbs()) - WITHOUT_ROUTE))
def test_http_says_the_same(verb, parameter, paths):
    assert_described(body(paths, f"/api/{verb}"), parameter)


@pytest.mark.parametrize("verb", OLLAMA_ROUTES)
def test_ollama_shapes_say_the_same(verb, paths):
    schema = body(paths, OLLAMA_ROUTES[verb])["options"]["properties"]
    options = [p for p in (*verbs()[verb].parameters, *load_parameters()) if p.option]
    assert schema.keys() == {option.name for option in options}
    for option in options:
        assert_described(schema, option)


@pytest.mark.parametrize(("verb", "path"), OPENAI_ROUTES)
def test_openai_shapes_say_the_same(verb, path, paths):
    schema = body(paths, path)
    for option in [p for p in (*verbs()[verb].parameters, *load_parameters()) if p.option]:
        assert_described(schema, option)


def assert_described(schema: dict[str, Any], parameter: Parameter) -> None:
    found = schema[parameter.name]
    assert found.get("description", "").replace("\n", " ") == parameter.help
    if parameter.default is not REQUIRED:
        default = parameter.default
        # FastAPI leaves out a default of null.
        assert found.get("default") == (list(default) if isinstance(default, tuple) else default)
    number = with_bounds(found)
    for key, bound in (("minimum", parameter.minimum), ("maximum", parameter.maximum)):
        # OpenAPI's bounds are floats in FastAPI.
        assert number.get(key) == (None if bound is None else float(bound))


@pytest.mark.parametrize(("verb", "parameter"), OPTIONS)
def test_python_says_the_same(verb, parameter):
    function = Session.__init__ if parameter in load_parameters() else getattr(Session, verb)
    found = inspect.signature(function).parameters[parameter.name]
    assert found.kind is inspect.Parameter.KEYWORD_ONLY
    assert found.default == parameter.default
    assert parameter.help


@pytest.mark.parametrize(("verb", "parameter"), [c for c in OPTIONS if c.values[1].minimum is not None])
def test_bounds_are_inclusive_and_an_error_names_the_option(verb, parameter):
    for bound in (parameter.minimum, parameter.maximum):
        assert convert(parameter, str(bound)) == bound
    for outside in (parameter.minimum - 1, parameter.maximum + 1, "lots", "nan"):
        with pytest.raises(OptionError, match=f"^{label(parameter)} must "):
            convert(parameter, str(outside))


@pytest.mark.parametrize("parameter", option_parameters(GenerateOptions), ids=lambda option: option.name)
def test_the_notebooks_controls_say_the_same(parameter):
    made = controls.control(parameter, Layout())
    if parameter.name in NO_CONTROL:
        assert made is None
        return
    assert (tuple(made.value) if parameter.name == "stop" else made.value) == parameter.default
    assert made.tooltip == parameter.help
    if parameter.minimum is not None:
        assert (made.min, made.max) == (parameter.minimum, parameter.maximum)


def test_every_number_has_bounds():
    for verb in verbs().values():
        for option in verb.parameters:
            if option.option and isinstance(option.default, int | float) and not isinstance(option.default, bool):
                assert None not in (option.minimum, option.maximum), (verb.name, option.name)


def test_no_two_parameters_of_a_command_share_a_name():
    for verb in verbs().values():
        names = [p.name for p in (*verb.parameters, *load_parameters())]
        assert len(names) == len({*names})
        assert {"in_json", "verbose", "stream"}.isdisjoint(names)


def test_serve_options_are_those_of_the_command(words):
    assert words["serve"].keys() - {"help"} == ServeOptions.model_fields.keys()
    for option in option_parameters(ServeOptions):
        found = words["serve"][option.name]
        assert (convert(option, found.default), found.help) == (option.default, option.help)


NEW_VERB = """
import json, sys
from irkit.options import Options, Text, accepts, parse
from irkit.session import Session
from pydantic import Field

class ShoutOptions(Options):
    loudness: int = Field(default=11, ge=1, le=12, description="How loud.")

@accepts(ShoutOptions)
def shout(self, text: Text, **options) -> str:
    \"\"\"Say it louder.\"\"\"
    return text.upper() + "!" * parse(ShoutOptions, options).loudness

Session.shout = shout
from irkit.server import create_app
route = create_app().openapi()["paths"]["/api/shout"]["post"]
schema = route["requestBody"]["content"]["application/json"]["schema"]
print(json.dumps([route["description"], schema["required"], schema["properties"]["loudness"]]))
from irkit.cli import main
sys.argv = ["irkit", "shout", *sys.argv[1:]]
main()
"""


def test_a_new_method_of_session_appears_on_every_surface(model_path):
    words = [str(model_path), "hello", "--loudness", "3"]
    done = subprocess.run([sys.executable, "-c", NEW_VERB, *words], capture_output=True, text=True, check=True)
    described, said = done.stdout.splitlines()
    summary, required, loudness = json.loads(described)
    assert (summary, required) == ("Say it louder.", ["model", "text"])
    assert (loudness["default"], loudness["minimum"], loudness["maximum"]) == (11, 1, 12)
    assert loudness["description"] == "How loud."
    assert said == "HELLO!!!"
