"""The web application: routes, and what surrounds every request."""

from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from megatron_chameleon.inference.engine.interface import TokenEngine
from megatron_chameleon.inference.serving.answering import Answerer
from megatron_chameleon.inference.serving.endpoints import AnswerEndpoint, JobReader
from megatron_chameleon.inference.serving.metrics import CONTENT_TYPE, Metrics
from megatron_chameleon.inference.serving.model import (
    PictureMaker,
    PromptEncoder,
    ServedModel,
    Workers,
)
from megatron_chameleon.inference.serving.network.guard import (
    Access,
    Guard,
    with_cors,
    with_headers,
)
from megatron_chameleon.inference.serving.network.page_files import page_routes
from megatron_chameleon.inference.serving.requests.json_body import BodyReader
from megatron_chameleon.inference.serving.requests.limits import Limits
from megatron_chameleon.inference.serving.requests.refusal import Refusal
from megatron_chameleon.inference.serving.responses import Responder
from megatron_chameleon.inference.serving.surroundings import Surroundings
from megatron_chameleon.wording import shown


@dataclass(frozen=True)
class Service:
    """One model behind one address."""

    engine: TokenEngine
    model: ServedModel
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    remote_images: bool = False


class ChameleonApp:
    """The ASGI application of a service.

    Attributes:
        answerer: What runs and waits; the server drains it when it stops.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        limits, model = service.limits, service.model
        self._metrics = Metrics(service.engine)
        self._workers = Workers()
        self.answerer = Answerer(service.engine, model, limits, self._metrics)
        encoder = PromptEncoder(model, limits, self._workers)
        pictures = PictureMaker(model, self._workers)
        self._responder = Responder(self.answerer, pictures, self._metrics)
        self._bodies = BodyReader(limits)
        self._reader = JobReader(
            model, self.answerer, encoder, limits, self._metrics, service.remote_images
        )
        # a Router, because Starlette would answer errors in its own form
        router = Router(self._routes(), redirect_slashes=False, default=_nothing_there)
        surrounded = Surroundings(Guard(router, service.access), self._metrics)
        self._app: ASGIApp = with_headers(with_cors(surrounded, service.access))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["app"] = self  # so that Starlette's routes raise their errors
        await self._app(scope, receive, send)

    def close(self) -> None:
        """Let the threads go."""
        self._workers.close()

    def _routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self._endpoint(self._reader.chat), methods=["POST"]),
            Route("/v1/completions", self._endpoint(self._reader.completion), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._one_model, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics_text, methods=["GET"]),
            *page_routes(),
        ]

    def _endpoint(self, read: Any) -> AnswerEndpoint:
        return AnswerEndpoint(
            read, self.answerer, self._responder, self._bodies, self._workers, self._metrics
        )

    async def _models(self, request: Request) -> Response:
        description = self._service.model.description(self._service.limits)
        return JSONResponse({"object": "list", "data": [description]})

    async def _one_model(self, request: Request) -> Response:
        model = self._service.model
        name = request.path_params["name"]
        if name != model.name:
            what = f"the model {shown(name)} is not served here"
            raise Refusal(404, "model", what, f"Use {model.name}", code="model_not_found")
        return JSONResponse(model.description(self._service.limits))

    async def _health(self, request: Request) -> Response:
        self.answerer.check_alive()
        usage = self._service.engine.usage()
        return JSONResponse(
            {"status": "ok", "running": usage.running, "waiting": usage.waiting},
        )

    async def _metrics_text(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)


async def _nothing_there(scope: Any, receive: Any, send: Any) -> None:
    raise HTTPException(404)
