"""What words on the command line stand for, where they are more than one value each."""

from pathlib import Path

import pytest

from irkit.cli.words import convert
from irkit.errors import OptionError
from irkit.verbs import Parameter, verbs

FORMAT, CAPTURE, EDITS = (
    next(p for p in verbs()["generate"].parameters if p.name == name) for name in ("format", "capture", "edits")
)


@pytest.mark.parametrize(
    ("parameter", "word", "value"),
    [
        (FORMAT, "json", "json"),
        (FORMAT, ' {"enum": ["a"]}', {"enum": ["a"]}),
        (FORMAT, "@schema.json", {"type": "string"}),
        (EDITS, "@edits.json", [{"name": "mlp_out"}]),
    ],
)
def test_objects_are_json_or_a_file_of_it(
    parameter: Parameter, word: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("schema.json").write_text('{"type": "string"}')
    Path("edits.json").write_text('[{"name": "mlp_out"}]')
    assert convert(parameter, word) == value


def test_where_any_text_goes_a_sign_is_a_sign() -> None:
    assert convert(CAPTURE, ["@nosuch"]) == ["@nosuch"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("@nosuch", "--format: nosuch cannot be read: No such file"),
        ("@.", "--format: . cannot be read"),
        ("@latin1", "--format: latin1 is not UTF-8"),
        ("{", "--format must be JSON"),
        ("xml", '--format: must be "json" or a JSON schema'),
    ],
)
def test_what_is_no_object_is_named(word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin1").write_bytes(b"\xff")
    with pytest.raises(OptionError, match=message):
        convert(FORMAT, word)
