"""`Session`: one object that runs a model, in Python, on the command line, over HTTP and in a notebook.

Its public methods are irkit's verbs. `irkit.verbs` reads them, with their options, and the command line
and the server are made from what it finds: a new method here appears on every surface.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from irkit import hub, notebook
from irkit.edits import Edit, call
from irkit.edits import parse as parse_edits
from irkit.engine import CacheView, Model, open_model
from irkit.errors import ContextFullError, OptionError
from irkit.observing import ASKED_BY, Asked
from irkit.options import (
    CaptureOptions,
    Captures,
    DetokenizeOptions,
    Edits,
    EmbedOptions,
    GenerateOptions,
    LensOptions,
    LoadOptions,
    Messages,
    ModelName,
    PlainText,
    ScoreOptions,
    ServeOptions,
    System,
    Template,
    Text,
    Texts,
    Think,
    TokenIds,
    TokenizeOptions,
    Tools,
    TraceOptions,
    accepts,
    check,
    parse,
    python_only,
)
from irkit.results import Generation, Info, Score
from irkit.trace import Estimate, Trace

if TYPE_CHECKING:
    import numpy as np

    from irkit.analysis.lens import LogitLens
    from irkit.engine.cache import Cache
    from irkit.server import Serving
    from irkit.tokenizer import ChatTemplate
    from irkit.widgets.steering import SteeringPanel
    from irkit.widgets.watch import WatchView


_CHARACTERS = 16
"""A token has fewer as a rule."""
_SHRINKING = 2
"""How many characters a tokenizer may make one of."""


class Session:
    """A model, opened, with a KV cache of its own.

    Opening reads the file's header only; the weights are loaded when something is first computed, and
    once for all sessions of the same file and options. A session may be used from several threads: what
    it computes is queued.
    """

    @accepts(LoadOptions)
    def __init__(self, model: ModelName, **options: Any) -> None:
        """Open `model`: a path, or a name (`irkit list`; `smollm2` is fetched if it is not there yet).

        Raises:
            ModelNotFoundError, ModelFileError, UnsupportedModelError: the model is not there, damaged or
                of a kind irkit does not run.
            OptionError: an option is unknown or out of bounds.
        """
        self.options = parse(LoadOptions, options)
        with notebook.progress() as progress:
            path = hub.ensure(model, progress=progress)
        self._manifest = hub.manifest(model)
        self._own = dict(self._manifest.options) if self._manifest else {}
        num_ctx = self._own.pop("num_ctx", None)
        if self.options.num_ctx is None:
            self.options = parse(LoadOptions, {**dict(self.options), "num_ctx": num_ctx})
        self.name = str(model)
        self._model: Model | None = open_model(path, self.options)
        self._cache = self._model.new_cache(self.options.num_ctx)
        self._edits: list[Edit] = []
        self._pooled = False
        self._observers: list[Callable[[Asked], Any]] = []
        self._serving: Serving | None = None

    @property
    def model(self) -> Model:
        """The loaded model, which sessions of the same file share.

        Raises:
            OptionError: the session is closed.
        """
        if self._model is None:
            raise OptionError(f"the session of {self.name} is closed")
        return self._model

    @property
    def n_ctx(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return self._cache.n_ctx

    @property
    def defaults(self) -> GenerateOptions:
        """How answers are made where a call does not say: `irkit create` sets it for a model."""
        return self._generate_options({})

    @cached_property
    def template(self) -> "ChatTemplate":
        """What lays conversations out: the chat template of the model's name (`irkit create`), or of its file."""
        source = self._manifest.template if self._manifest else None
        return self.model.template_of(source) if source else self.model.template

    @accepts(GenerateOptions)
    def generate(self, prompt: Text, capture: Captures = None, edits: Edits = None, **options: Any) -> Generation:
        """Continue a text, as it is: no chat template is applied.

        With `capture`, each token carries a `Trace` of the forward pass that made it, in `token.captures`.

        Raises:
            ContextFullError: the prompt does not fit the context.
            OptionError: an option is unknown or out of bounds.
        """
        parsed = self._generate_options(options)
        self.model.load()  # tokenizing goes on beside it
        return self._answer(self._ids(prompt, "prompt"), parsed, capture, edits, prompt)

    @accepts(GenerateOptions)
    def respond(
        self,
        messages: Messages,
        tools: Tools = None,
        capture: Captures = None,
        edits: Edits = None,
        think: Think = None,
        template: Template = None,
        **options: Any,
    ) -> Generation:
        """Answer a conversation, laid out by the model's own chat template.

        With `capture`, each token carries a `Trace` of the forward pass that made it, in `token.captures`.

        Raises:
            ContextFullError: the conversation does not fit the context.
            OptionError: an option is unknown or out of bounds, the template refuses the messages, or has no place for
                tools or thinking.
            ModelFileError: `template` is none.
        """
        parsed = self._generate_options(options)
        self.model.load()  # the template and the tokenizer go on beside it
        messages, ids, stop = self._laid_out(messages, tools, think, template)
        parsed = parsed.model_copy(update={"stop": (*parsed.stop, *stop)})
        return self._answer(ids, parsed, capture, edits, messages)

    @python_only
    def render(self, messages: Messages, tools: Tools = None, think: Think = None) -> str:
        """A conversation as the text that `respond` has the model go on with.

        Raises:
            OptionError: the template refuses the messages, or has no place for tools or thinking.
        """
        conversation = self._conversation(messages, self.template, tools, think)
        return self.template.render(conversation, tools=tools, think=think)

    @python_only
    @accepts(GenerateOptions)
    def agenerate(self, prompt: Text, capture: Captures = None, edits: Edits = None, **options: Any) -> Generation:
        """`generate`, to be awaited or iterated with `async for`, as every `Generation` can be.

        `await` gives the answer when it has ended; the event loop goes on meanwhile. If the task that awaits it is
        cancelled, so is the answer.
        """
        return self.generate(prompt, capture, edits, **options)

    @python_only
    @accepts(GenerateOptions)
    def arespond(
        self,
        messages: Messages,
        tools: Tools = None,
        capture: Captures = None,
        edits: Edits = None,
        think: Think = None,
        template: Template = None,
        **options: Any,
    ) -> Generation:
        """`respond`, to be awaited or iterated with `async for`, as every `Generation` can be."""
        return self.respond(messages, tools, capture, edits, think, template, **options)

    @accepts(TokenizeOptions)
    def tokenize(self, text: PlainText, **options: Any) -> list[int]:
        """Turn text into token ids."""
        parsed = parse(TokenizeOptions, options)
        return self.model.tokenizer.encode(check(PlainText, "text", text), parsed.add_special, parsed.parse_special)

    @accepts(DetokenizeOptions)
    def detokenize(self, ids: TokenIds, **options: Any) -> str:
        """Turn token ids into text.

        Raises:
            OptionError: an id is not in the vocabulary.
        """
        parsed = parse(DetokenizeOptions, options)
        return self.model.tokenizer.decode(check(TokenIds, "ids", ids), parsed.skip_special)

    @accepts(ScoreOptions)
    def score(self, text: Text, **options: Any) -> Score:
        """Give the log-probability of each token of a text after the tokens before it.

        Raises:
            ContextFullError: the text does not fit the context.
        """
        parsed = parse(ScoreOptions, options)
        ids, edits = self._ids(text, "text"), tuple(self._edits)
        return self.model.score(ids, parsed.top_logprobs, self._cache.n_ctx, edits, self._pooled)

    @accepts(TraceOptions)
    def trace(self, texts: Texts, edits: Edits = None, **options: Any) -> Trace:
        """Show what one forward pass computes, at the hook points `names`.

        Raises:
            BudgetError: the trace would take more memory than it may; `estimate` says how much.
            ContextFullError: a text does not fit the context.
            OptionError: there is no such hook point, layer, head or position.
        """
        parsed, rows = parse(TraceOptions, options), self._rows(texts)
        changes = (*self._edits, *parse_edits(edits))
        return self.model.trace(self.name, rows, parsed, changes, self._cache.n_ctx)

    @accepts(TraceOptions)
    def estimate(self, texts: Texts, edits: Edits = None, **options: Any) -> Estimate:
        """Say how many bytes `trace` would hold, without computing anything."""
        parsed, rows = parse(TraceOptions, options), self._rows(texts)
        changes = (*self._edits, *parse_edits(edits))
        return self.model.estimate(rows, parsed, changes, self._cache.n_ctx)

    @accepts(LensOptions)
    def lens(self, text: Text, edits: Edits = None, **options: Any) -> "LogitLens":
        """Say which tokens the model would say next if it stopped after each of its layers: the logit lens.

        Raises:
            ContextFullError: the text does not fit the context.
            OptionError: there is no such layer or position.
        """
        from irkit.analysis import logit_lens  # imported late, as analysis lies above Session

        parsed, ids = parse(LensOptions, options), self._ids(text, "text")
        return logit_lens(self, ids, edits=edits, **dict(parsed))

    @accepts(EmbedOptions)
    def embed(self, texts: Texts, **options: Any) -> "np.ndarray":
        """Give one float32 vector a text, `[text, d_model]`: its final hidden states, pooled.

        Raises:
            ContextFullError: a text does not fit the context.
        """
        parsed = parse(EmbedOptions, options)
        edits = tuple(self._edits)
        return self.model.embed(self._rows(texts), parsed.pooling, parsed.normalize, self._cache.n_ctx, edits)

    @python_only
    def run_with_cache(
        self,
        texts: Texts,
        names_filter: "str | Sequence[str] | Callable[[str], bool] | None" = None,
        pos_slice: "int | slice | Sequence[int] | None" = None,
        **options: Any,
    ) -> "tuple[np.ndarray, Trace]":
        """Run the model and keep what the hook points show, in TransformerLens's words: logits `[b, pos, d_vocab]`,
        and the cache.

        `options` are those of `trace`.
        """
        from irkit.engine.tapping import choose
        from irkit.transformer.taps import hook_names

        names = names_filter
        if callable(names):
            names = tuple(filter(names, hook_names(self.model.config.n_layers)))
        length = max(map(len, self._rows(texts)))
        positions = choose(pos_slice, length, "pos_slice") if pos_slice is not None else None
        found = self.trace(texts, names=names, positions=positions, **options)
        return found.logits, found

    @python_only
    def run_with_hooks(
        self, texts: Texts, fwd_hooks: "Sequence[tuple[Any, Callable[..., Any]]]" = (), edits: Edits = None
    ) -> "np.ndarray":
        """Run the model with functions at its hook points: the logits `[b, pos, d_vocab]`.

        Each of `fwd_hooks` is a name, or a function of names, and a `function(value, hook)`. It is traced once and
        compiled: it returns the new value (or None to leave it) and cannot change `value` in place.
        """
        with self.hooks(fwd_hooks, edits):
            return self.trace(texts, names=()).logits

    @python_only
    @contextmanager
    def hooks(
        self, fwd_hooks: "Sequence[tuple[Any, Callable[..., Any]]]" = (), edits: Edits = None
    ) -> "Iterator[Session]":
        """Within the `with` block, everything the session computes goes through these functions and edits."""
        from irkit.transformer.taps import hook_names

        n_layers = self.model.config.n_layers
        changes = [
            call(full, function)
            for name, function in fwd_hooks
            for full in (filter(name, hook_names(n_layers)) if callable(name) else [name])
        ]
        before = self._edits
        self._edits = [*before, *changes, *parse_edits(edits)]
        try:
            yield self
        finally:
            self._edits = before

    @python_only
    def observe(self, observer: "Callable[[Asked], Any]") -> Callable[[], None]:
        """Have `observer` told of every answer that this session, or a fork of it, begins; call the result to end that.

        It is called in the thread that asks, which waits for it.
        """
        self._observers.append(observer)

        def end() -> None:
            if observer in self._observers:
                self._observers.remove(observer)

        return end

    @property
    def cache(self) -> CacheView:
        """The KV cache: to look at, fork, rewind, drop from, save and load. Assign a fork to put it in its place.

        Raises:
            ContextFullError: what is assigned holds more than the session's context.
            OptionError: the session is closed, or what is assigned is no cache of the same model and options.
        """
        return CacheView(self.model, self._cache)

    @cache.setter
    def cache(self, snapshot: CacheView) -> None:
        self.cache._put(snapshot)

    @python_only
    @accepts(GenerateOptions)
    def generate_many(
        self, prompts: Texts, capture: Captures = None, edits: Edits = None, **options: Any
    ) -> list[Generation]:
        """Continue several texts at once, which takes much less time than one after the other.

        Each answer is the same as alone, to the bit on a CPU's kernels; with a `seed`, all draw with that one. The
        session's own cache is left as it is.

        Raises:
            ContextFullError: a prompt does not fit the context.
            OptionError: an option is unknown or out of bounds.
        """
        several = self.pooled()
        rows = self._rows(prompts)
        return [several.generate(ids, capture, edits, **options) for ids in rows]

    @python_only
    def pooled(self) -> "Session":
        """A session of the same model for answers that have nothing to do with each other, made at once.

        Each takes, of the caches that earlier ones have left, that which begins most like its prompt; `cache` stays
        empty. This is how the server computes.
        """
        made = copy.copy(self)
        made._cache, made._pooled, made._serving = self.model.new_cache(self._cache.n_ctx), True, None
        return made

    @python_only
    def fork(self, cache: CacheView | None = None) -> "Session":
        """A session of the same model whose cache begins as a fork of this one's, or of `cache`: the same, and then
        independent.

        Raises:
            OptionError, ContextFullError: `cache` is of another model or other options, or holds too much.
        """
        made = copy.copy(self)
        made._cache = self.model.new_cache(self._cache.n_ctx)
        made._edits, made._pooled, made._serving = [], False, None
        made.cache = self.cache if cache is None else cache
        return made

    @python_only
    @accepts(GenerateOptions)
    def continue_from(
        self,
        token_index: int | None = None,
        alternative: "int | str | Sequence[int] | None" = None,
        capture: Captures = None,
        edits: Edits = None,
        **options: Any,
    ) -> Generation:
        """Keep the cached tokens before `token_index`, put `alternative` behind them, and generate on from there.

        What is kept is not computed again, but for the last token where there is no `alternative`; `edits` change what
        comes after it. What comes behind is lost, unless it was forked.

        Args:
            token_index: A position in the cached text; a negative one counts from its end, None is its end.
            alternative: A token id, several, or a text, in which the names of control tokens are not read as such.
            capture: As for `generate`.
            edits: As for `generate`; negative positions count from the end of `alternative`.
            options: As for `generate`.

        Raises:
            ContextFullError: the text does not fit the context.
            OptionError: there is no such position, an option is unknown or out of bounds, or the cache is empty.
        """
        parsed = self._generate_options(options)
        if isinstance(alternative, str):
            new: Sequence[int] = self.model.tokenizer.encode(alternative, add_special=False)
        else:
            given = [] if alternative is None else [alternative] if isinstance(alternative, int) else alternative
            new = self._ids(given, "alternative")
        kept = self.cache._before(token_index)
        ids = [*kept.ids, *new]
        return self._answer(ids, parsed, capture, edits, ids, kept=kept)

    def info(self) -> Info:
        """Say what the model is and how it is run here."""
        found = self.model.info(self.name, self._cache.n_ctx)
        return replace(found, chat_template=True) if self._manifest and self._manifest.template else found

    def reset(self) -> None:
        """Forget the tokens in the KV cache; the next prompt is computed from its start."""
        self.model.submit(self._cache.clear, self._cache)
        if self._pooled:
            self.model.forget()

    @accepts(GenerateOptions)
    def chat(self, system: System = None, **options: Any) -> Any:
        """Talk to the model: in a notebook a chat to be displayed, in a terminal a prompt loop.

        Raises:
            OptionError: an option is unknown or out of bounds, or there is neither notebook nor terminal.
        """
        # The surfaces this verb opens are imported late, as they lie above Session.
        parsed = self._generate_options(options)
        if notebook.shell() is not None:
            import irkit.widgets.base  # noqa: F401 - first, as it says so if something is not installed
            from irkit.widgets.chat import Chat

            return Chat(self, system or "", parsed)
        from irkit import cli

        return cli.prompt_loop(self, system, parsed)

    @python_only
    @accepts(GenerateOptions)
    def steering(self, vectors: "Mapping[str, Any] | None" = None, prompt: str = "", **options: Any) -> "SteeringPanel":
        """A panel in a notebook: sliders for steering vectors, heads and layers, and the answer with what they edit
        beside the one without.

        `panel.edits` are what is chosen, for `generate` and the others. The session's own cache is left as it is.

        Args:
            vectors: By name, arrays `[d_model]` or what `irkit.analysis.steering_vector` finds.
            prompt: What both answers answer.
            options: As for `generate`, for both answers; and what else `irkit.view.steering` lets choose.

        Raises:
            OptionError: a vector does not fit the model, or an option is unknown or out of bounds.
        """
        from irkit import view  # imported late, as surfaces lie above Session

        return view.steering(self, vectors, prompt=prompt, **options)

    @python_only
    def watch(self) -> "WatchView":
        """A view in a notebook of what this session answers, here or over HTTP (`serve`), while it answers it."""
        from irkit import view

        return view.watch(self)

    @python_only
    @accepts(ServeOptions)
    def serve(self, **options: Any) -> "Serving":
        """Serve the loaded model over HTTP, beside what else is done with it, until `stop()` of what this returns, or
        until the session is closed.

        Requests have caches of their own. Served already, with the same options, the running server is returned; with
        others, it is stopped first.

        Raises:
            OptionError: an option is unknown or out of bounds, or the address cannot be listened on.
        """
        from irkit.server import Serving  # a surface that this opens, imported late, as surfaces lie above Session

        parsed = parse(ServeOptions, options)
        running = self._serving if self._serving and self._serving.running else None
        if running is None or running.options != parsed:
            if running is not None:
                running.stop()
            self._serving = Serving(parsed, self)
        assert self._serving is not None
        return self._serving

    def close(self) -> None:
        """Cancel what is running and let go of the model; its memory is freed with its last session."""
        if self._serving is not None:
            self._serving.stop()
        if self._model is not None:
            self._cache.closed.set()
            self._model.submit(self._cache.clear, self._cache)
            self._model = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.name!r})" if self._model else f"<closed Session({self.name!r})>"

    def _repr_html_(self) -> str:
        from irkit import reprs

        return reprs.session(self)

    def _answer(
        self,
        ids: Sequence[int],
        options: GenerateOptions,
        capture: Any,
        edits: Any,
        asked: Any,
        kept: "Cache | None" = None,
    ) -> Generation:
        """Begins the answer to `ids`, which are what was `asked` as the model reads it."""
        pooled = self._pooled and kept is None
        captured, changes = self._taps(capture, edits)
        made = self.model.generate(ids, options, self._cache, captured, changes, kept=kept, pooled=pooled)
        if self._observers:
            words = asked if isinstance(asked, str) or not all(isinstance(part, int) for part in asked) else None
            words = self.model.tokenizer.decode(ids) if words is None else words
            event = Asked(words, options, made, self.name, changes, ASKED_BY.get().request)
            for observer in tuple(self._observers):
                observer(event)
        return notebook.ends_with_cell(made)

    def _laid_out(
        self, messages: Any, tools: Any = None, think: bool | None = None, template: str | None = None
    ) -> tuple[Sequence[Mapping[str, Any]], list[int], tuple[str, ...]]:
        """A conversation as it is asked, as the model reads it, and the texts that end its answer.

        The plain format that stands in for a missing template ends a turn with words, not with a token.
        """
        layout = self.template if template is None else self.model.template_of(template)
        asked = self._conversation(messages, layout, tools, think)
        self._check_length(_characters(asked), "messages")
        return asked, layout.encode(self.model.tokenizer, asked, tools=tools, think=think), tuple(layout.stop)

    def _conversation(self, messages: Any, layout: "ChatTemplate", tools: Any, think: bool | None) -> Any:
        """The messages, with the system message of the model's name (`irkit create`) where there is no other.

        Raises:
            OptionError: the template has no place for tools or thinking.
        """
        if tools and not layout.takes_tools:
            raise OptionError(f"model '{self.name}' does not support tools", "tools")
        if think and not layout.forms.thinking:
            raise OptionError(f"model '{self.name}' does not support thinking", "think")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        system = self._manifest.system if self._manifest else None
        if system and isinstance(messages, Sequence) and not any(map(_is_system, messages)):
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def _generate_options(self, given: Mapping[str, Any]) -> GenerateOptions:
        return parse(GenerateOptions, {**self._own, **given})

    def _taps(self, capture: Any, edits: Any) -> tuple[CaptureOptions | None, tuple[Edit, ...]]:
        if capture is not None:
            given = capture if isinstance(capture, Mapping) else {"names": capture}
            capture = parse(CaptureOptions, given)
        return capture, (*self._edits, *parse_edits(edits))

    def _rows(self, texts: Any) -> list[Sequence[int]]:
        """Token ids of each of `texts`, which may be one text, or the ids of one."""
        texts = check(Texts | TokenIds, "texts", texts)
        one = isinstance(texts, str) or (len(texts) > 0 and isinstance(texts[0], int))
        several: Any = [texts] if one else texts
        return [self._ids(text, "texts") for text in several]

    def _check_length(self, characters: int, what: str) -> None:
        """Raises ContextFullError where no text of so many could fit the context: millions take long to tokenize."""
        if characters > _CHARACTERS * self._cache.n_ctx:  # most texts are nowhere near: their tokens need no look
            most = _SHRINKING * self.model.tokenizer.longest * self._cache.n_ctx
            if characters > most:
                raise ContextFullError(
                    f"{what}: {characters} characters do not fit the context, which holds {self._cache.n_ctx} tokens"
                )

    def _ids(self, text: Any, what: str) -> Sequence[int]:
        """Token ids of `text`, which may be token ids already; BOS alone for an empty text."""
        text = check(Text, what, text)
        tokenizer = self.model.tokenizer
        if isinstance(text, str):
            self._check_length(len(text), what)
            return tokenizer.encode(text) or [token for token in [tokenizer.bos_id] if token is not None]
        size = tokenizer.vocab_size
        for token in text:
            if not 0 <= token < size:
                raise OptionError(f"{what}: token id {token} is outside the vocabulary of {size}")
        return text


def _characters(messages: Any) -> int:
    """Of the texts in a conversation."""
    several = messages if isinstance(messages, Sequence) else ()
    texts = (message.get("content") for message in several if isinstance(message, Mapping))
    return sum(len(text) for text in texts if isinstance(text, str))


def _is_system(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") in ("system", "developer")
