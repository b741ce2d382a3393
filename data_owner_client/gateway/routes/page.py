"""The playground's static files, at the gateway's root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

_FOLDER = Path(__file__).parents[1] / "page"
_INDEX = "index.html"
# Of browsers: modules need their type, and systems differ in what they call it.
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def page_router() -> APIRouter:
    """A router with a route for each file; `/` is the page itself."""
    router = APIRouter(include_in_schema=False)
    for path, file in page_files().items():
        router.add_api_route(path, _answer(file), methods=["GET", "HEAD"])
    return router


def page_files() -> dict[str, Path]:
    """The files by their paths on the gateway."""
    files = {f"/{file.name}": file for file in sorted(_FOLDER.iterdir()) if file.suffix in _TYPES}
    return {"/": files[f"/{_INDEX}"], **files}


def _answer(file: Path) -> Callable[[], FileResponse]:
    def answer() -> FileResponse:
        # Not taken from the browser's cache without asking: the next version of the client has other files.
        return FileResponse(file, media_type=_TYPES[file.suffix], headers={"Cache-Control": "no-cache"})

    return answer
