"""The least that Flask can do: answers that are held in memory, by their names."""

import os
from pathlib import Path

from flask import Flask, Response

folder = Path(os.environ["ANSWERS"])
answers = {file.name: file.read_bytes() for file in folder.iterdir()}

app = Flask(__name__)


@app.get("/<name>")
def show(name: str) -> Response:
    """One of the answers."""
    return Response(answers[name], mimetype="application/json")
