"""Controls: what they are made from, what they say, and what presets do."""

from typing import Any, Literal

import pytest
from pydantic import Field

from irkit.errors import OptionError
from irkit.options import GenerateOptions, Options, parse
from irkit.widgets import controls


def test_every_option_but_those_that_are_no_simple_value_has_a_control() -> None:
    made = controls.sampling()
    assert {"temperature", "top_k", "seed", "stop", "num_predict"} <= set(made.widgets)
    assert parse(GenerateOptions, made.read()) == GenerateOptions()


def test_what_bounds_do_not_allow_is_not_said() -> None:
    made = controls.sampling()
    made.set(temperature=99, top_k=-5)
    assert (made.read()["temperature"], made.read()["top_k"]) == (10, -1)
    with pytest.raises(OptionError):
        parse(GenerateOptions, {"temperature": 99})


def test_presets_and_own_values() -> None:
    made = controls.sampling(values={"temperature": 0.5, "stop": ("\n",), "logit_bias": {1: 2.0}})
    told: list[dict[str, Any]] = []
    made.observe(told.append)
    assert (made.read()["temperature"], made.read()["stop"], made.preset.value) == (0.5, ("\n",), "balanced")
    made.preset.value = "creative"
    assert made.read()["temperature"] == 1.2
    assert {"temperature": 1.2} in told
    made.preset.value = "greedy"
    assert (made.read()["temperature"], made.read()["top_k"]) == (0, 40)  # back to where it began
    made.preset.value = "balanced"
    assert made.read()["temperature"] == 0.5
    made.set(top_p=0.3)
    assert made.preset.value == "own values"
    assert told[-1] == {"top_p": 0.3}


def test_a_page_that_rounds_changes_nothing() -> None:
    made = controls.sampling()
    made.set(repeat_penalty=1.0000000000000002)
    assert made.read()["repeat_penalty"] == 1
    assert made.preset.value == "balanced"


def test_other_kinds_of_options() -> None:
    class Some(Options):
        deep: bool = Field(default=True, description="How deep.")
        kind: Literal["a", "b"] = Field(default="b", description="Of what kind.")
        steps: int = Field(default=3, ge=1, le=9, description="How many.")

    made = controls.sampling(Some)
    assert made.read() == {"deep": True, "kind": "b", "steps": 3}
    assert made.widgets["kind"].options == ("a", "b")
