"""What a notebook shows of a result: small pieces of HTML that need no script, for light and dark grounds alike.

Colours are tints of the ground, and texts take the notebook's own colour. Where a viewer takes the style away, as
GitHub's does, tables, paragraphs and titles are left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irkit.results import Generation, Info, Score, Token
    from irkit.trace import Trace

SHADES = 9
"""Steps from a token that was sure to one that was not expected at all."""
MOST_TOKENS = 2000
"""Tokens that are shown one by one; of a longer text only the text is shown."""
_END = 60
"""Tokens of a cache that are shown, the last ones."""
SURPRISE = 8.0
"""Nats at which the shade is full: a probability of 0.03 %."""

_STYLE = """<style>
.irkit-out{line-height:1.5;max-width:60em}
.irkit-out .irkit-words{white-space:pre-wrap;overflow-wrap:anywhere;margin:0 0 .3em}
.irkit-out .irkit-facts{opacity:.65;font-size:.85em;margin:0}
.irkit-out table{border-collapse:collapse;color:inherit;margin:.3em 0;font-size:.9em}
.irkit-out td,.irkit-out th{padding:.1em .9em .1em 0;text-align:left;vertical-align:top;background:none;border:0}
.irkit-out tr{background:none}
.irkit-out th{opacity:.65;font-weight:normal}
.irkit-out .irkit-t{border-radius:2px}
.irkit-out .irkit-t:hover{outline:1px solid currentColor}
%s
</style>""" % "\n".join(  # noqa: UP031 - the braces are CSS's
    f".irkit-out .irkit-s{step}{{background:rgba(240,140,30,{0.55 * step / SHADES:.2f})}}"
    for step in range(1, SHADES + 1)
)


def generation(made: Generation) -> str:
    """An answer: its text, each token shaded by how little it was expected, and what it took."""
    tokens, done = tuple(made._tokens), made.done
    text = made.partial_text
    shown = (spans(tokens) + escape(made._tail)) if done and len(tokens) <= MOST_TOKENS else escape(text)
    return out(f'<div class="irkit-words">{shown}</div>', note(generation_facts(made)))


def generation_facts(made: Generation) -> list[str]:
    """What an answer took, in words; what is known of it while it is being made."""
    count = len(made._tokens)
    of = f" of {made._most:,}" if made._most and not made.done else ""
    facts = [f"{count:,}{of} tokens" if of else _counted(count, "token")]
    if made._error:
        return [*facts, f"failed: {made._error}"]
    if not made.done:
        speed = _speed(made._tokens)
        return [*facts, *([f"{speed:.0f} tokens/s"] if speed else []), "…" if count else "reading the prompt …"]
    stats = made._stats
    if stats.tokens_per_second:
        facts.append(f"{stats.tokens_per_second:.0f} tokens/s")
    facts.append(f"prompt {stats.prompt_tokens}" + (f", {stats.cached_tokens} cached" if stats.cached_tokens else ""))
    return [*facts, str(made._reason)]


def _speed(tokens: Sequence[Token]) -> float:
    first, last = (tokens[at].time for at in (0, -1)) if len(tokens) > 1 else (None, None)
    return (len(tokens) - 1) / (last - first) if first is not None and last is not None and last > first else 0.0


def score(scored: Score) -> str:
    """A text, each token shaded by how little it was expected."""
    facts = [_counted(len(scored.tokens), "token"), f"{scored.total:.2f} nats"]
    facts += [f"perplexity {scored.perplexity:.2f}"] if not math.isnan(scored.perplexity) else []
    return out(f'<div class="irkit-words">{spans(scored.tokens)}</div>', note(facts))


def info(found: Info) -> str:
    """What a model is, as a table."""
    from irkit.trace import size

    heads = f"{found.n_heads} ({found.n_kv_heads} of keys and values), {found.d_head} wide"
    rows = {
        "name": found.name or found.architecture,
        "parameters": f"{found.parameters / 1e6:,.0f} million, {found.quantization}, {size(found.size)}",
        "architecture": f"{found.architecture}: {found.n_layers} layers, {found.d_model} wide, MLP {found.d_mlp}",
        "heads": heads,
        "vocabulary": f"{found.d_vocab:,} tokens",
        "context": f"{found.n_ctx:,} tokens" + f" of {found.n_ctx_train:,}" * (found.n_ctx != found.n_ctx_train),
        "chat template": "the file's own" if found.chat_template else "none in the file: a plain one stands in",
        "license": found.license or "not said",
        "precision": found.precision,
        "backend": found.backend,
        "kernels": found.kernels,
        "file": found.path,
    }
    return out(f"<b>{escape(found.model)}</b>", table(rows.items()))


def session(of: Any) -> str:
    """A `Session` in two lines, without computing or loading anything."""
    from irkit.trace import size

    if of._model is None:
        return out(note([repr(of).strip("<>")]))
    model, config = of.model, of.model.config
    facts = [
        f"{config.n_layers} layers × {config.n_heads} heads, {config.d_model} wide",
        size(model.path.stat().st_size) if model.path.is_file() else "its file is gone",
        model.precision,
        f"{len(of._cache.ids):,} of {of._cache.n_ctx:,} tokens of context in use",
    ]
    return out(f"<b>Session</b> of <b>{escape(of.name)}</b>", note(facts))


def cache(of: Any) -> str:
    """A `CacheView`: how full it is, and the end of its text; it does not wait for an answer that is being made."""
    from irkit.trace import size

    ids, held = tuple(of._cache.ids), of._cache
    facts = [f"{len(ids):,} of {held.n_ctx:,} tokens", held.kind, size(of._nbytes())]
    text = of._model.tokenizer.decode(ids[-_END:], skip_special=False)
    shown = f'<div class="irkit-words">{"…" if len(ids) > _END else ""}{escape(text)}</div>' if ids else ""
    return out(f"<b>KV cache</b> of <b>{escape(of._model.path.stem)}</b>", shown, note(facts))


def trace(of: Trace) -> str:
    """Which hook points a trace holds, of how many layers, with which axes; nothing is read."""
    summary, rows = of._summary()
    heads = ("name", "layers", "axes", "reduced" if any(row[-1] for row in rows) else "")
    held = table([heads, *rows], head=True)
    return out(f"<b>Trace</b> of <b>{escape(of.provenance.model)}</b>", note(summary), held)


def spans(tokens: Iterable[Token]) -> str:
    """Tokens one by one, shaded; a title says how likely each was, and what else could have stood there."""
    return "".join(map(_span, tokens))


def _span(token: Token) -> str:
    if token.logprob is None:
        return escape(token.text)
    shade = min(round(SHADES * -token.logprob / SURPRISE), SHADES)
    lines = [f"{token.text!r}: {_percent(token.logprob)} ({token.logprob:.2f} nats)"]
    lines += [f"{other.text!r}: {_percent(other.logprob)}" for other in token.top if other.id != token.id]
    kind = f"irkit-t irkit-s{shade}" if shade > 0 else "irkit-t"
    return f'<span class="{kind}" title="{escape(chr(10).join(lines))}">{escape(token.text)}</span>'


def _percent(logprob: float) -> str:
    return f"{100 * math.exp(logprob):.3g} %"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def out(*parts: str) -> str:
    """Pieces of HTML as one output."""
    return f'{_STYLE}<div class="irkit-out">{"".join(parts)}</div>'


def note(facts: Iterable[str]) -> str:
    """A line of small print."""
    return f'<p class="irkit-facts">{" · ".join(map(escape, facts))}</p>'


def table(rows: Iterable[Sequence[Any]], *, head: bool = False) -> str:
    """A table of texts; the first row, or the first cell of each, is a heading."""
    lines = []
    for number, row in enumerate(rows):
        kinds = ["th" if (number == 0 if head else at == 0) else "td" for at in range(len(row))]
        cells = zip(kinds, row, strict=True)
        lines.append("".join(f"<{kind}>{escape(str(cell))}</{kind}>" for kind, cell in cells))
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
