"""What the server has done and is doing, for Prometheus: `GET /metrics`."""

from __future__ import annotations

import time
from typing import Any

import psutil
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from irkit.engine.worker import DEVICE
from irkit.observing import Asked
from irkit.results import Generation
from irkit.server.sessions import Sessions

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEEDS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)


class Metrics:
    """The counts of one application: two in a process have nothing to do with each other."""

    def __init__(self, sessions: Sessions) -> None:
        self.registry = CollectorRegistry()
        to: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("irkit_requests", "Requests answered", ["method", "route", "status"], **to)
        self.seconds = Histogram(
            "irkit_request_seconds", "From a request to the end of its response", ["route"], buckets=_SECONDS, **to
        )
        self.answers = Counter("irkit_answers", "Answers made, by why they ended", ["model", "reason"], **to)
        self.read = Counter("irkit_prompt_tokens", "Tokens of prompts, those in the cache included", ["model"], **to)
        self.cached = Counter("irkit_cached_tokens", "Tokens of prompts that were in the cache", ["model"], **to)
        self.made = Counter("irkit_generated_tokens", "Tokens made", ["model"], **to)
        self.formed = Counter("irkit_form_tokens", "Tokens made that a format restricts", ["model"], **to)
        self.forming = Counter(
            "irkit_form_seconds", "Finding which tokens a format allows, between steps", ["model"], **to
        )
        self.first = Histogram(
            "irkit_first_token_seconds", "From asking to the first token", ["model"], buckets=_SECONDS, **to
        )
        self.speed = Histogram(
            "irkit_tokens_per_second", "Decoding speed of one answer", ["model"], buckets=_SPEEDS, **to
        )
        process = psutil.Process()
        gauges = {
            "irkit_slots": ("Answers that may be made at once", lambda: DEVICE.most),
            "irkit_slots_busy": ("Answers being made", lambda: DEVICE.running),
            "irkit_queue": ("Answers that wait for a slot", lambda: DEVICE.queued),
            "irkit_models": ("Models held", lambda: len(sessions.held)),
            "irkit_models_bytes": ("Memory that the weights of the models held take", lambda: sessions.nbytes),
            "irkit_memory_bytes": ("Resident memory of the process", lambda: process.memory_info().rss),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, **to).set_function(read)

    def observe(self, asked: Asked) -> None:
        """Count an answer that has begun, when it has ended."""
        asked.generation.when_done(lambda generation: self._count(asked.model, generation))

    def _count(self, model: str, generation: Generation) -> None:
        if generation.failed:
            self.answers.labels(model, "failed").inc()
            return
        stats = generation.stats
        self.read.labels(model).inc(stats.prompt_tokens)
        self.cached.labels(model).inc(stats.cached_tokens)
        self.made.labels(model).inc(stats.tokens)
        if stats.form_seconds:
            self.formed.labels(model).inc(stats.tokens)
            self.forming.labels(model).inc(stats.form_seconds)
        if stats.tokens:
            self.first.labels(model).observe(stats.load_seconds + stats.prefill_seconds)
        if stats.tokens_per_second:
            self.speed.labels(model).observe(stats.tokens_per_second)
        self.answers.labels(model, generation.finish_reason).inc()  # last: who sees it sees the rest of its answer


class CountsRequests:
    """ASGI middleware that counts requests by route and status, and the seconds they take."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # Not the path: whoever asks for many would make as many counters.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.requests.labels(method, route, status).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - began)


_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}


def router(metrics: Metrics) -> APIRouter:
    """The route of the metrics."""
    routes = APIRouter()

    @routes.get("/metrics", response_class=Response)
    def show() -> Response:
        """Tell Prometheus what the server has done."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return routes
