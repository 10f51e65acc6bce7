"""JSON and YAML texts as Python values; numbers come as floats, which nobody keeps."""

import json
import re
from collections import Counter
from typing import Any, NoReturn

import yaml

# How much of a text is told.
LONGEST = 80

# What is no text where it has no quotes (10.3.2 of the specification).
CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "true": r"true|True|TRUE",
    "false": r"false|False|FALSE",
    "decimal": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
    "number": r"0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}

# Text to OpenFn's reader; libyaml refuses these or, as 1.1 has it, ends a line at them.
# They are read as characters for private use, which stand for nothing else.
ODD = [*range(9), 11, 12, *range(14, 32), *range(127, 160)]
ODD += [0x2028, 0x2029, 0xFEFF, 0xFFFE, 0xFFFF]
HIDE = {code: 0x100000 + code for code in ODD}
SHOW = {hidden: code for code, hidden in HIDE.items()}

# libyaml refuses a block of text that begins with a tab, as JavaScript may, but not
# behind a line of its own. Each is found by one more reading, up to so many characters.
TAB = "found a tab character where an indentation space is expected"
LINE_OF_ITS_OWN = "\U00100009\n"
MOST_READ = 50_000_000

KINDS = {
    yaml.ScalarNode: "text",
    yaml.SequenceNode: "sequence",
    yaml.MappingNode: "mapping",
}


class Loader(yaml.CBaseLoader):
    """Makes values of a text, and nothing that a tag asks for."""

    def __init__(self, text: str) -> None:
        """``repeated`` is how much aliases have added to the text."""
        super().__init__(text)
        self.repeated, self.most = 0, 10 * len(text)

    def resolve(self, kind: type[yaml.Node], value: str, implicit: Any) -> str:
        """What is to be made of a node without a tag."""
        if kind is yaml.ScalarNode and implicit[0]:
            for name, form in CORE_SCHEMA.items():
                if re.fullmatch(form, value):
                    return name
        return KINDS[kind]

    def text(self, node: yaml.ScalarNode) -> str:
        """The text as it stands in the file."""
        value: str = self.construct_scalar(node)
        if value.isascii():
            return value
        return value.replace(LINE_OF_ITS_OWN, "").translate(SHOW)

    def child(self, node: yaml.Node) -> Any:
        """The value of a node within another, where many aliases may stand for one."""
        if node in self.constructed_objects:
            self.repeated += len(node.value)
        if self.repeated > self.most:
            refuse("found aliases that make the file ten times as long", node)
        return self.construct_object(node, deep=True)

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        """An array."""
        return [self.child(item) for item in node.value]

    def mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """An object, whose keys are text, each of them once."""
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.text(key_node)
            if key in made:
                refuse(f'found "{told(key)}" twice in one object', key_node)
            made[key] = self.child(value_node)
        return made

    yaml_constructors = {
        "null": lambda loader, node: None,
        "true": lambda loader, node: True,
        "false": lambda loader, node: False,
        "decimal": lambda loader, node: float(node.value),
        "number": lambda loader, node: float("nan"),
        "text": text,
        "sequence": sequence,
        "mapping": mapping,
        None: lambda loader, node: refuse("found a tag", node),
    }


def refuse(problem: str, node: yaml.Node) -> NoReturn:
    """Say what is wrong with a node, and where it stands."""
    raise yaml.MarkedYAMLError(None, None, problem, node.start_mark)


class InvalidFile(Exception):
    """Says what is wrong with a file: an argument, a line, a fault."""


def parse(content: bytes) -> Any:
    """The value of a JSON or YAML text in UTF-8, with or without a byte order mark.

    Raises InvalidFile.
    """
    try:
        text = content.decode("utf-8-sig")
        # What OpenFn writes in YAML begins with a key.
        is_json = re.match(r"\s*[\[{]", text)
        return parse_json(text) if is_json else parse_yaml(text)
    except UnicodeDecodeError as error:
        message = f"The file is not UTF-8 at byte {error.start}."
    except json.JSONDecodeError as error:
        message = f"The file is not JSON: {error}."
    except RecursionError:
        message = "The file is nested too deep."
    raise InvalidFile(message)


def parse_json(text: str) -> Any:
    """The value of a JSON text."""
    return json.loads(
        text,
        object_pairs_hook=without_repeated_keys,
        # int() refuses the longest.
        parse_int=float,
        parse_constant=not_json,
    )


def not_json(constant: str) -> NoReturn:
    """Refuse what Python's parser takes and RFC 8259 does not."""
    raise InvalidFile(f"The file is not JSON: {constant} is no number.")


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; InvalidFile where a key stands twice in it."""
    keys = Counter(key for key, _ in pairs)
    if len(keys) < len(pairs):
        [(key, _)] = keys.most_common(1)
        raise InvalidFile(f'The file has "{told(key)}" twice in one object.')
    return dict(pairs)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of one document; aliases share theirs."""
    text = text.translate(HIDE)
    # A block's last line ends, even where the file does not say so.
    if not text.endswith("\n"):
        text += "\n"
    added: list[int] = []
    while True:
        try:
            return yaml.load(text, Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            if mark is None or error.problem == "exceeded maximum nesting depth":
                raise RecursionError from None
            if error.problem != TAB or len(added) * len(text) > MOST_READ:
                line = mark.line + 1 - sum(other < mark.line for other in added)
                raise InvalidFile(
                    f"The file is neither JSON nor plain YAML: {error.problem} "
                    f"at line {line}, column {mark.column + 1}."
                ) from None
            start = mark.index - mark.column
            indented = " " * mark.column + LINE_OF_ITS_OWN
            text = text[:start] + indented + text[start:]
            added.append(mark.line)


def told(text: str) -> str:
    """A text on one line, cut off where it is long."""
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    return text if text.isprintable() else json.dumps(text)
