"""The OpenAPI document as a page for people: Swagger UI, nothing from elsewhere."""

import secrets
from importlib.resources import files
from mimetypes import guess_type

from flask import Blueprint, Response, abort, render_template

swagger_ui = Blueprint(
    "swagger_ui", __name__, url_prefix="/api/docs", template_folder="."
)

# What the page may load and run; no other page may frame it.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)

# In memory, since an open file for each client who does not read would be too many.
ASSETS = {
    name: files("flask_swagger_ui").joinpath("dist", name).read_bytes()
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
}


@swagger_ui.get("")
def show_page() -> Response:
    """The page."""
    nonce = secrets.token_urlsafe(16)
    response = Response(render_template("docs.html", nonce=nonce))
    response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY.format(
        nonce=nonce
    )
    return response


@swagger_ui.get("/<name>")
def show_file(name: str) -> Response:
    """A file of the page's."""
    if name not in ASSETS:
        abort(404)
    response = Response(ASSETS[name], mimetype=guess_type(name)[0])
    response.headers["Cache-Control"] = "max-age=3600"
    return response
