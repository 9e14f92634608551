"""What a model may be given of its own, checked before it is written down: options and a chat template."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from irkit.errors import ModelFileError, OptionError
from irkit.hub import gotemplate
from irkit.options import GenerateOptions, LoadOptions, parse

# What Ollama's models may set, and that has no meaning here.
_IGNORED = re.compile(
    "mirostat(_tau|_eta)?|tfs_z|penalize_newline|num_(keep|gpu|gqa|thread|batch)|main_gpu|low_vram|f16_kv|numa|"
    "logits_all|vocab_only|use_m(map|lock)|embedding_only|draft_num_predict"
)


def checked_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as JSON values; those that only Ollama has are left out, with a warning.

    Raises:
        OptionError: an option is unknown, of the wrong type or out of bounds.
    """
    ignored = [name for name in given if _IGNORED.fullmatch(name)]
    if ignored:
        warnings.warn(f"without meaning here, and left out: {', '.join(ignored)}", stacklevel=3)
    load = {name: value for name, value in given.items() if name == "num_ctx"}
    rest = {name: value for name, value in given.items() if name not in (*ignored, "num_ctx")}
    parsed = parse(GenerateOptions, rest), parse(LoadOptions, load)
    return {name: value for each in parsed for name, value in each.model_dump(mode="json", exclude_unset=True).items()}


def checked_template(source: str) -> str | None:
    """`source` as Jinja; None, with a warning, for a Go template that has no simple counterpart in it.

    Raises:
        OptionError: it is no template.
    """
    found = as_jinja(source)
    if found is None:
        warnings.warn("the template, a Go one, cannot be read here; the model file's own is used", stacklevel=3)
    return found


def as_jinja(source: str) -> str | None:
    """A template in Jinja, or one of Ollama's in Go, as Jinja; None where that has no simple counterpart in it.

    Raises:
        OptionError: it is no template.
    """
    from irkit.tokenizer.sandbox import compile_template

    found = gotemplate.to_jinja(source) if gotemplate.is_go(source) else source
    try:
        if found is not None:
            compile_template(found)
    except ModelFileError as error:
        raise OptionError(str(error)) from None
    return found
