"""The documents, and the blocks of code in them, which tests run."""

import re
from textwrap import dedent

from servers import ROOT

README = (ROOT / "README.md").read_text()
DEPLOYMENT = (ROOT / "docs/deployment.md").read_text()
DATABASES = (ROOT / "docs/databases.md").read_text()


def block(text, language, word):
    """Return the only block of code in a language that contains a word."""
    form = rf"^ *```{language}\n(.*?)^ *```"
    blocks = re.findall(form, text, re.DOTALL | re.MULTILINE)
    [found] = [block for block in blocks if word in block]
    return dedent(found)
