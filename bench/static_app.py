"""A bare Flask app that returns stored responses from memory, by their names."""

import os
from pathlib import Path

from flask import Flask, Response

folder = Path(os.environ["RESPONSES"])
bodies = {file.name: file.read_bytes() for file in folder.iterdir()}

app = Flask(__name__)


@app.get("/<name>")
def show(name: str) -> Response:
    """Return one of the stored responses."""
    return Response(bodies[name], mimetype="application/json")
