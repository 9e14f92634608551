"""`Session`: one object that runs a model, in Python, on the command line, over HTTP and in a notebook.

Its public methods are irkit's verbs. `irkit.verbs` reads them, with their options, and the command line
and the server are made from what it finds: a new method here appears on every surface.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from irkit import hub
from irkit.engine import Model, open_model
from irkit.errors import OptionError
from irkit.options import (
    DetokenizeOptions,
    EmbedOptions,
    GenerateOptions,
    LoadOptions,
    Messages,
    ModelName,
    PlainText,
    ScoreOptions,
    System,
    Text,
    Texts,
    TokenIds,
    TokenizeOptions,
    Tools,
    accepts,
    check,
    parse,
)
from irkit.results import Generation, Info, Score

if TYPE_CHECKING:
    import numpy as np


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
        self.name = str(model)
        self._model: Model | None = open_model(hub.ensure(model), self.options)
        self._cache = self._model.new_cache(self.options.num_ctx)

    @property
    def model(self) -> Model:
        """The loaded model, which sessions of the same file share.

        Raises:
            OptionError: the session is closed.
        """
        if self._model is None:
            raise OptionError(f"the session of {self.name} is closed")
        return self._model

    @accepts(GenerateOptions)
    def generate(self, prompt: Text, **options: Any) -> Generation:
        """Continue a text, as it is: no chat template is applied.

        Raises:
            ContextFullError: the prompt does not fit the context.
            OptionError: an option is unknown or out of bounds.
        """
        parsed = parse(GenerateOptions, options)
        self.model.load()  # tokenizing goes on beside it
        return self.model.generate(self._ids(prompt, "prompt"), parsed, self._cache)

    @accepts(GenerateOptions)
    def respond(self, messages: Messages, tools: Tools = None, **options: Any) -> Generation:
        """Answer a conversation, laid out by the model's own chat template.

        Raises:
            ContextFullError: the conversation does not fit the context.
            OptionError: an option is unknown or out of bounds, or the template refuses the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        parsed = parse(GenerateOptions, options)
        model = self.model
        model.load()  # the template and the tokenizer go on beside it
        ids = model.template.encode(model.tokenizer, messages, tools=tools)
        # The plain format that stands in for a missing template ends a turn with words, not with a token.
        parsed = parsed.model_copy(update={"stop": (*parsed.stop, *model.template.stop)})
        return model.generate(ids, parsed, self._cache)

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
        return self.model.score(self._ids(text, "text"), parsed.top_logprobs, self._cache.n_ctx)

    @accepts(EmbedOptions)
    def embed(self, texts: Texts, **options: Any) -> "np.ndarray":
        """Give one float32 vector a text, `[text, d_model]`: its final hidden states, pooled.

        Raises:
            ContextFullError: a text does not fit the context.
        """
        parsed = parse(EmbedOptions, options)
        several = [texts] if isinstance(texts, str) else check(Texts, "texts", texts)
        ids = [self._ids(text, "texts") for text in several]
        return self.model.embed(ids, parsed.pooling, parsed.normalize, self._cache.n_ctx)

    def info(self) -> Info:
        """Say what the model is and how it is run here."""
        return self.model.info(self.name, self._cache.n_ctx)

    def reset(self) -> None:
        """Forget the tokens in the KV cache; the next prompt is computed from its start."""
        self.model.submit(self._cache.clear)

    @accepts(GenerateOptions)
    def chat(self, system: System = None, **options: Any) -> None:
        """Talk to the model, in a prompt loop in the terminal.

        Raises:
            OptionError: an option is unknown or out of bounds, or there is no terminal.
        """
        from irkit import cli  # the surface this verb opens; imported late, as surfaces lie above Session

        cli.prompt_loop(self, system, parse(GenerateOptions, options))

    def close(self) -> None:
        """Cancel what is running and let go of the model; its memory is freed with its last session."""
        if self._model is not None:
            self._cache.closed.set()
            self._model.submit(self._cache.clear)
            self._model = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Session({self.name!r})" if self._model else f"<closed Session({self.name!r})>"

    def _ids(self, text: Any, what: str) -> Sequence[int]:
        """Token ids of `text`, which may be token ids already; BOS alone for an empty text."""
        text = check(Text, what, text)
        tokenizer = self.model.tokenizer
        if isinstance(text, str):
            return tokenizer.encode(text) or [token for token in [tokenizer.bos_id] if token is not None]
        size = tokenizer.vocab_size
        for token in text:
            if not 0 <= token < size:
                raise OptionError(f"{what}: token id {token} is outside the vocabulary of {size}")
        return text
