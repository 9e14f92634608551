"""Modelfiles, as people write them for Ollama."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.errors import OptionError
from irkit.hub import read_modelfile

FULL = '''# a pirate
FROM ./model.gguf
parameter temperature 0.5
PARAMETER stop "<|im_end|>"
PARAMETER stop "User: "
PARAMETER num_ctx 64

TEMPLATE """{{ if .System }}{{ .System }}
{{ end }}{{ .Prompt }} """
SYSTEM """
You are "a pirate".
"""
LICENSE MIT # or so
LICENSE "Apache"
REQUIRES 0.14.0
'''


@pytest.mark.parametrize("text", [FULL, FULL.replace("\n", "\r\n"), FULL.rstrip()])
def test_every_instruction(text: str) -> None:
    found = read_modelfile(text)
    assert found.source == "./model.gguf"
    assert found.options == {"temperature": "0.5", "stop": ["<|im_end|>", "User: "], "num_ctx": "64"}
    assert found.system is not None
    assert found.system.split("\n")[1].strip() == 'You are "a pirate".'
    assert found.template is not None
    assert found.template.startswith("{{ if .System }}")
    assert found.template.endswith("{{ .Prompt }} ")
    assert found.license == "MIT # or so\n\nApache"


def test_quotes_within_a_line_are_a_part_of_it() -> None:
    assert read_modelfile('FROM x\nSYSTEM "Yes" or "no"?').system == '"Yes" or "no"?'
    assert read_modelfile("FROM x\nSYSTEM Hello.   ").system == "Hello."
    assert read_modelfile('FROM x\nPARAMETER stop "\\n"').options == {"stop": ["\\n"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no FROM"),
        ("# FROM x", "has no FROM"),
        ("FROM", "line 1 of the Modelfile: FROM has no value"),
        ("FROM x\n\nADAPTER y", "line 3 of the Modelfile: adapters are not supported"),
        ("FROM x\nMESSAGE user hi", "line 2 of the Modelfile: messages"),
        ("FROM x\nTEMPERATURE 1", "line 2 of the Modelfile: there is no instruction 'TEMPERATURE'"),
        ('FROM x\nSYSTEM """never', "line 2 of the Modelfile: SYSTEM is not ended"),
        ("FROM x\nPARAMETER", "not complete"),
        ("FROM x\nPARAMETER top_k", "PARAMETER has no value"),
        ("FROM x" * (1 << 18), "more than the 1048576 allowed"),
    ],
)
def test_what_is_no_modelfile(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read_modelfile(text)


@given(
    st.lists(st.sampled_from(["FROM", "SYSTEM", "PARAMETER", '"', '"""', "\n", " ", "#", "stop", "x", "\r"])).map(
        "".join
    )
)
def test_any_text_ends_in_a_modelfile_or_one_error(text: str) -> None:
    try:
        found = read_modelfile(text)
    except OptionError:
        return
    assert found.source
