"""Go templates as Jinja: what Go would write for a conversation, worked out by hand, is what the Jinja writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.hub.gotemplate import is_go, to_jinja
from irkit.tokenizer import ChatTemplate

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
WRITTEN = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n"
)
BY_TURNS = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
BY_MESSAGES = """{{- /* all */ -}}
{{- range $i, $_ := .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
BY_ROLE = """{{- if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}
{{- range .Messages }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if and (eq .Role "assistant") .Content }}<|im_start|>assistant
{{ .Content }}<|im_end|>
{{ end }}
{{- end }}<|im_start|>assistant
"""


@pytest.mark.parametrize("source", [BY_TURNS, BY_MESSAGES, BY_ROLE], ids=["turns", "messages", "roles"])
def test_three_ways_to_write_one_format(source: str) -> None:
    jinja = to_jinja(source)
    assert jinja is not None
    assert is_go(source)
    assert not is_go(jinja)
    assert ChatTemplate(jinja).render(TALK) == WRITTEN


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("[INST] {{ .System }} {{ .Prompt }} [/INST]", "[INST] S U1 [/INST]A1[INST]  U2 [/INST]"),
        ("{{ .Prompt }}>{{ .Response }}{{ if .System }}!{{ else }}?{{ end }}", "S\nU1>A1?U2>"),
        ('{{ .Prompt }}\\ "{{ .Response }}%s\r\n', 'S\nU1\\ "A1%s\r\nU2\\ "'),
        ("{{ if not .System }}-{{ end }}  {{- .Prompt -}}  é{{ .Response }}", "-S\nU1éA1-U2é"),
    ],
)
def test_turns(source: str, expected: str) -> None:
    """Where the system message would be lost, `ChatTemplate` puts it before the first prompt."""
    jinja = to_jinja(source)
    assert jinja is not None
    assert ChatTemplate(jinja).render(TALK) == expected


@pytest.mark.parametrize(
    "source",
    [
        *("{{ range .Tools }}{{ end }}", "{{ .Suffix }}", "{{ if .Prompt }}", "{{ len .Prompt }}", "{{ $x := 1 }}"),
        *("{{ with .System }}{{ . }}{{ end }}", "{{ end }}", "{{ eq .Role }}", "{{ json .Messages }}", "{{ }}"),
        *("{{ range .Messages }}{{ .Prompt }}{{ end }}", "{{ .Prompt | html }}", "{{ (eq .Prompt .System }}"),
    ],
)
def test_what_is_not_understood_is_not_guessed(source: str) -> None:
    assert to_jinja(source) is None


@given(
    st.lists(st.sampled_from([*' \n-"\\{}%', "{{", "}}", " .Prompt ", " if ", " end ", "else", "x", " - "])).map(
        "".join
    )
)
def test_what_is_understood_is_sound_jinja(source: str) -> None:
    jinja = to_jinja(source)
    if jinja is not None:
        ChatTemplate(jinja).render(TALK)


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content }}", "{% for m in messages %}{{ .x }}{% endfor %}", "plain"]
)
def test_jinja_is_not_taken_for_go(source: str) -> None:
    assert not is_go(source)
