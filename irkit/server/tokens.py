"""Tokens and templates in the shapes of llama-server, and of vLLM, which `lm-eval` asks for.

They name no model as a rule: it is the one that the server holds.
"""

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response

from irkit.errors import OptionError
from irkit.options import LoadOptions, Messages, Options, PlainText, TokenIds, Tools
from irkit.server.replies import json_response
from irkit.server.requests import body_of, read
from irkit.server.sessions import Sessions
from irkit.session import Session


class _NamesModel(Options):
    model: str | None = None
    """The name of a model; if not given, the one that the server holds, or the only one there is."""


class TokenizeRequest(_NamesModel):
    """The body of `POST /tokenize`."""

    content: PlainText | None = None
    add_special: bool = False
    """Add the tokens the model expects around a text, such as BOS."""
    parse_special: bool = True
    """Read control tokens written out in the text as what they name."""
    with_pieces: bool = False
    """Give the text of each token too, or its bytes where it is no text by itself."""
    prompt: PlainText | None = None
    """The same as `content`, as vLLM calls it."""
    add_special_tokens: bool = True
    """The same as `add_special`, for a `prompt`."""


class DetokenizeRequest(_NamesModel):
    """The body of `POST /detokenize`."""

    tokens: TokenIds


class TemplateRequest(_NamesModel):
    """The body of `POST /apply-template`."""

    messages: Messages
    tools: Tools = None


def router(sessions: Sessions) -> APIRouter:
    """The routes, over `sessions`."""
    routes = APIRouter(tags=["tokens"])

    async def session_of(model: str | None) -> Session:
        name = model or await to_thread.run_sync(sessions.only)
        return await sessions.get(name, LoadOptions(), computes=False)

    @routes.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Turn text into token ids."""
        asked = await read(request, TokenizeRequest)
        text, special = asked.content, asked.add_special
        if text is None:
            text, special = asked.prompt, asked.add_special_tokens
        if text is None:
            raise OptionError('option "content" is missing', "content")
        session = await session_of(asked.model)

        def made() -> Response:
            ids = session.tokenize(text, add_special=special, parse_special=asked.parse_special)
            tokens = [{"id": id, "piece": _piece(session, id)} for id in ids] if asked.with_pieces else ids
            return json_response({"tokens": tokens, "count": len(ids), "max_model_len": session.n_ctx})

        return await to_thread.run_sync(made)

    @routes.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Turn token ids into text."""
        asked = await read(request, DetokenizeRequest)
        session = await session_of(asked.model)

        def made() -> Response:
            text = session.detokenize(asked.tokens)
            return json_response({"content": text, "prompt": text})

        return await to_thread.run_sync(made)

    @routes.post("/apply-template", openapi_extra=body_of(TemplateRequest))
    async def apply_template(request: Request) -> dict[str, str]:
        """Lay a conversation out as the model reads it."""
        asked = await read(request, TemplateRequest)
        session = await session_of(asked.model)
        return {"prompt": await to_thread.run_sync(session.render, asked.messages, asked.tools)}

    @routes.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> dict[str, Any]:
        """Say which tokens begin and end a text, and how a conversation is laid out."""
        session = await session_of(model)
        tokenizer = await to_thread.run_sync(lambda: session.model.tokenizer)
        bos, eos = (None if id is None else tokenizer.token(id) for id in (tokenizer.bos_id, tokenizer.eos_id))
        return {
            "tokenizer_class": "irkit",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": eos,
            "add_bos_token": tokenizer.add_bos,
            "chat_template": session.template.source,
        }

    return routes


def _piece(session: Session, id: int) -> str | list[int]:
    found = session.model.tokenizer.token_bytes(id)
    try:
        return found.decode()
    except UnicodeDecodeError:
        return [*found]
