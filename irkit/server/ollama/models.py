"""Ollama's routes about models: which there are and which run, what they are, and how they come and go."""

import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from fastapi.concurrency import contextmanager_in_threadpool
from fastapi.responses import Response

import irkit
from irkit import gguf, hub
from irkit.engine import backends
from irkit.errors import OptionError
from irkit.server.ollama.jobs import Job
from irkit.server.ollama.requests import CopyRequest, CreateRequest, OllamaRequest, PullRequest, ShowRequest, refuse
from irkit.server.places import PLACE
from irkit.server.replies import json_response
from irkit.server.requests import body_of, read
from irkit.server.sessions import Running, Sessions, missing
from irkit.server.streams import answer_lines, answer_once
from irkit.tokenizer import ChatTemplate
from irkit.tokenizer.vocabulary import read_vocabulary

API_VERSION = "0.33.0"
"""The release of Ollama whose API this follows: clients compare it with what they need."""

JOBS = 16
"""The most pulls and the like at once; further ones wait."""

_FOR_EVER = 100 * 365 * 24 * 3600.0


def router(sessions: Sessions) -> APIRouter:
    """These routes, over `sessions` and the registry."""
    routes = APIRouter()
    limiter = CapacityLimiter(JOBS)

    @routes.head("/version", include_in_schema=False)
    @routes.get("/version")
    def version() -> dict[str, str]:
        """Say which version of Ollama's API this is, and of irkit."""
        return {"version": API_VERSION, "irkit": irkit.__version__}

    @routes.head("/tags", include_in_schema=False)
    @routes.get("/tags")
    async def tags() -> dict[str, Any]:
        """List the models on the server's machine."""
        lent = [running for running in sessions.running() if running.lent]

        def listed() -> list[hub.Manifest]:
            found = {manifest.name: manifest for manifest in hub.models()}
            return [*found.values(), *(_manifest_of(running) for running in lent if running.name not in found)]

        return {"models": [_tag(manifest) for manifest in await to_thread.run_sync(listed)]}

    @routes.head("/ps", include_in_schema=False)
    @routes.get("/ps")
    async def ps() -> dict[str, Any]:
        """List the models in memory, and how long they stay there."""
        running = sessions.running()
        return {"models": await to_thread.run_sync(lambda: [*map(_process, running)])}

    @routes.post("/show", openapi_extra=body_of(ShowRequest))
    async def show(request: Request) -> Response:
        """Say what a model is, and what it can do."""
        asked = await read(request, ShowRequest)
        name = await sessions.name_of(asked.named)
        lent = next((running for running in sessions.running() if running.lent and running.name == name), None)

        def made() -> Response:
            return json_response(_shown(_manifest_of(lent) if lent else _here(asked.named), asked.verbose))

        return await to_thread.run_sync(made)

    @routes.post("/pull", openapi_extra=body_of(PullRequest))
    async def pull(request: Request) -> Response:
        """Fetch a model."""
        asked = await read(request, PullRequest)
        before = {manifest.name: manifest for manifest in await to_thread.run_sync(hub.models)}

        def work(job: Job) -> Sequence[str]:
            made = hub.pull(asked.named, progress=job.progress)
            job.say("verifying sha256 digest")
            job.say("writing manifest")
            return [] if made == before.get(made.name) else [made.name]

        return await reported(request, asked.stream, work)

    @routes.post("/create", openapi_extra=body_of(CreateRequest))
    async def create(request: Request) -> Response:
        """Make a model of another one, or of a file that was sent, with a template, a system prompt and options."""
        asked = await read(request, CreateRequest)
        refuse(asked, "adapters", "messages", "quantize")
        name = hub.own_name(asked.named)

        def work(job: Job) -> Sequence[str]:
            source, own = _source(asked)
            hub.create(name, source, **own)
            job.say("writing manifest")
            return [name]

        return await reported(request, asked.stream, work)

    @routes.post("/copy", openapi_extra=body_of(CopyRequest))
    async def copy(request: Request) -> Response:
        """Give a model a further name."""
        asked = await read(request, CopyRequest)
        made = await to_thread.run_sync(lambda: hub.copy(_here(asked.source).name, asked.destination))
        await sessions.forget(made.name)
        return Response()

    async def reported(request: Request, stream: bool, work: Callable[[Job], Iterable[str]]) -> Response:
        """The response to `work`, which takes long, and returns the names that mean another model now."""
        job = Job()

        async def end(names: Iterable[str]) -> None:
            for name in names:
                await sessions.forget(name)

        lines = job.lines(work, end, limiter)
        if stream:
            return await answer_lines(request, job, lines)
        return await answer_once(request, job, _last(lines))

    @routes.delete("/delete", openapi_extra=body_of(OllamaRequest))
    async def delete(request: Request) -> Response:
        """Remove a model."""
        asked = await read(request, OllamaRequest)
        name = (await to_thread.run_sync(_here, asked.named)).name
        await sessions.forget(name)
        await to_thread.run_sync(hub.remove, name)
        return Response()

    @routes.head("/blobs/{digest}", include_in_schema=False)
    def has_blob(digest: str) -> Response:
        """Say whether a file of this sha256 was sent."""
        return Response(status_code=200 if hub.blob(digest) else 404)

    @routes.post("/blobs/{digest}", status_code=201)
    async def take_blob(digest: str, request: Request) -> Response:
        """Take a file, to create a model of."""
        if await to_thread.run_sync(hub.blob, digest):
            return Response()
        length = request.headers.get("content-length", "")
        writer = hub.blob_writer(digest, int(length) if length.isdecimal() else None)
        async with contextmanager_in_threadpool(writer) as write:
            async for chunk in request.stream():
                await to_thread.run_sync(write, chunk)
                if place := PLACE.get():
                    place.held = 0  # it is on the disk
        return Response(status_code=201)

    return routes


async def _last(lines: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return [line async for line in lines][-1]


def _here(model: str) -> hub.Manifest:
    """The model on this machine that a name means."""
    found = hub.find(model)
    if found is None:
        raise missing(model)
    return found


def _manifest_of(running: Running) -> hub.Manifest:
    """That of a model in memory; its file may be anywhere, or gone, and is not read for its digest."""
    if found := hub.find(running.name):
        return found
    info = running.model.info(running.name, running.n_ctx)
    return hub.Manifest(
        name=running.name,
        path=running.model.path,
        size=info.size,
        architecture=info.architecture,
        parameters=info.parameters,
        quantization=info.quantization,
        sha256="",
        added_at=datetime.now(UTC),
    )


def _tag(manifest: hub.Manifest) -> dict[str, Any]:
    return {
        "name": manifest.name,
        "model": manifest.name,
        "modified_at": manifest.added_at.isoformat(),
        "size": manifest.size,
        "digest": manifest.sha256,
        "details": _details(manifest),
    }


def _details(manifest: hub.Manifest) -> dict[str, Any]:
    millions = manifest.parameters / 1e6
    return {
        "parent_model": "",
        "format": "gguf",
        "family": manifest.architecture,
        "families": [manifest.architecture],
        "parameter_size": f"{millions:.1f}M" if millions < 1000 else f"{millions / 1000:.1f}B",
        "quantization_level": manifest.quantization,
    }


def _process(running: Running) -> dict[str, Any]:
    model, size = running.model, running.model.nbytes
    expires = datetime.now(UTC) + timedelta(seconds=min(max(running.expires, 0.0), _FOR_EVER))
    found = _tag(_manifest_of(running)) | {
        "size": size,
        "size_vram": 0 if backends.select(model.backend, model.threads).name == "cpu" else size,
        "context_length": running.n_ctx,
        "expires_at": expires.isoformat(),
    }
    del found["modified_at"]
    return found


def _shown(manifest: hub.Manifest, verbose: bool) -> dict[str, Any]:
    with gguf.open(manifest.path) as file:
        metadata = dict(file.metadata)
        tensors = [
            {"name": name, "type": tensor.format, "shape": list(tensor.shape)} for name, tensor in file.tensors.items()
        ]
    vocabulary = read_vocabulary(metadata)
    source = manifest.template or vocabulary.chat_template or ""
    template = ChatTemplate(source) if source.strip() else None
    can = {
        "completion": True,
        "tools": template is not None and template.calls_tools,
        "thinking": template is not None and template.forms.thinking is not None,
        "insert": vocabulary.fill_in_middle is not None,
        "embedding": f"{manifest.architecture}.pooling_type" in metadata,
    }
    license = manifest.license or metadata.get("general.license")
    lists = (list, np.ndarray)
    # A list of a hundred thousand tokens is of use to few.
    info = {key: None if isinstance(value, lists) and not verbose else value for key, value in metadata.items()}
    shown = {
        "modelfile": _modelfile(manifest, source),
        "parameters": "\n".join(f"{name:<30} {value}" for name, value in _parameters(manifest)),
        "template": source,
        "details": _details(manifest),
        "model_info": _plain(info | {"general.parameter_count": manifest.parameters}),
        "capabilities": [name for name, able in can.items() if able],
        "modified_at": manifest.added_at.isoformat(),
    }
    shown |= {"license": license} if isinstance(license, str) else {}
    shown |= {"system": manifest.system} if manifest.system else {}
    return shown | ({"tensors": tensors} if verbose else {})


def _parameters(manifest: hub.Manifest) -> list[tuple[str, str]]:
    """The options of a model, a name and a word each, as a Modelfile writes them."""
    several = [
        (name, item)
        for name, value in manifest.options.items()
        for item in (value if isinstance(value, list) else [value])
    ]
    return [(name, json.dumps(item, ensure_ascii=False)) for name, item in several]


def _modelfile(manifest: hub.Manifest, template: str) -> str:
    lines = [f"FROM {manifest.name}", *(f"PARAMETER {name} {value}" for name, value in _parameters(manifest))]
    lines += [f'{name} """{text}"""' for name, text in (("TEMPLATE", template), ("SYSTEM", manifest.system)) if text]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """A value of a file's metadata as JSON, which has no number that is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [*map(_plain, value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _source(asked: CreateRequest) -> tuple[Any, dict[str, Any]]:
    """What a model is made of, for `hub.create`, and what of its own it has."""
    given = asked
    options: Mapping[str, Any] = asked.parameters
    if asked.modelfile:
        told = hub.read_modelfile(asked.modelfile)
        options = told.options | dict(options)
        given = asked.model_copy(
            update={
                "from_": told.source,
                "template": asked.template or told.template or "",
                "system": asked.system or told.system or "",
                "license": asked.license or told.license or "",
            }
        )
    license = given.license if isinstance(given.license, str) else "\n\n".join(given.license)
    if given.template and hub.as_jinja(given.template) is None:
        raise OptionError("the template, a Go one, is beyond those that can be read here", "template")
    own = {"template": given.template, "system": given.system, "options": options, "license": license}
    own = {name: value for name, value in own.items() if value}
    # A path would be any file of the server's machine.
    digest = given.from_[1:] if given.from_.startswith("@") else ""
    if given.files:
        if len(given.files) > 1:
            raise OptionError('option "files" must be one GGUF file', "files")
        ((_, digest),) = given.files.items()
    if digest:
        path = hub.blob(digest)
        if path is None:
            raise OptionError(f"no file was sent as {digest[:80]}", "files")
        return path, own
    if not given.from_:
        raise OptionError("neither 'from' or 'files' was specified", "from")
    return _here(given.from_), own
