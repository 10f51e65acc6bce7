"""The OpenAPI document as a page for people (Swagger UI), with all of its files."""

import secrets
from importlib.resources import files
from mimetypes import guess_type

from flask import Blueprint, Response, abort, render_template

swagger_ui = Blueprint(
    "swagger_ui", __name__, url_prefix="/api/docs", template_folder="."
)

# The page may load and run only its own files, and no other page may embed it.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}'; img-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)

# send_from_directory would keep a file open for each client that reads slowly.
ASSETS = {
    name: files("flask_swagger_ui").joinpath("dist", name).read_bytes()
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
}


@swagger_ui.get("")
def show_page() -> Response:
    """Return the page."""
    nonce = secrets.token_urlsafe(16)
    policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY.format(nonce=nonce)}
    return Response(render_template("docs.html", nonce=nonce), headers=policy)


@swagger_ui.get("/<name>")
def show_file(name: str) -> Response:
    """Return a file that the page loads."""
    if name not in ASSETS:
        abort(404)
    headers = {"Cache-Control": "max-age=3600"}
    return Response(ASSETS[name], headers=headers, mimetype=guess_type(name)[0])
