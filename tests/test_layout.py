"""Check the limits on the size of the running code, and the direction of imports."""

import ast
import re

from conftest import ROOT

SOURCES = {path.name: path.read_text() for path in ROOT.glob("*.py")}


def test_modules_have_at_most_250_lines():
    lengths = {name: len(source.splitlines()) for name, source in SOURCES.items()}
    assert {name: length for name, length in lengths.items() if length > 250} == {}


def test_functions_have_at_most_30_lines():
    lengths = {
        f"{name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for name, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: length for name, length in lengths.items() if length > 30} == {}


def test_only_wsgi_imports_the_application():
    application = re.compile(r"^\s*(from|import) app\b", re.MULTILINE)
    assert [name for name in SOURCES if application.search(SOURCES[name])] == [
        "wsgi.py"
    ]
