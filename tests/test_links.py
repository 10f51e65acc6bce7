"""Links between the documents, and the tests that they name."""

import re

import pytest
from conftest import ROOT

DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]


def without_code(text):
    """Return the prose, without blocks and spans of code."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path):
    """Return the anchors of a document's headings, as GitHub makes them."""
    text = re.sub(
        r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)
def test_relative_links_and_anchors_exist(document):
    for target in re.findall(r"\]\(([^)]+)\)", without_code(document.read_text())):
        if re.match("https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists() and linked.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(linked), target


def test_every_promise_names_a_test_that_exists():
    """Each row of docs/reliability.md ends with one or more of them."""
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (?!when |---)(.*) \|$", text, re.MULTILINE)
    assert rows
    for row in rows:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split(" | ")[-1])
        assert names, row
        for file, name in names:
            source = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), name


def test_every_document_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert f"]({path.relative_to(ROOT)})" in text
