"""Read YAML and JSON so that every value remembers the file and line it stands on.

Both languages become PyYAML's nodes, which keep marks: YAML by its composer, JSON from its tokens after the standard library
has found it valid. PyYAML's YAML 1.1 habits that surprise people are switched off: `1e-5` is a number, `on`, `yes` and
`12:30` are text, and `010` is refused instead of being read as 8.

A text that cannot be read at all is raised; a value that cannot is added to the problems and left out, so that the user sees
it together with everything else.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ds_trainer.errors import ArgumentsError, Problem

MAX_DEPTH = 50
MAX_NODES = 100_000  # aliases multiply: without a limit a small file can fill the memory
MAX_BYTES = 1024 * 1024
MAX_KEY = 100
MAX_INT = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written."""

    source: str
    """A file as the user named it, `--set`, or `default`."""
    line: int | None = None
    """Counted from 1; None where there are no lines."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Located:
    """A value and where it stands. Containers hold Located children; a scalar is a str, int, float, bool or None."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without origins, as ordinary dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def leaves(self, path: str = "") -> Iterator[tuple[str, Located]]:
        """Every dotted path with its value; lists and empty mappings count as one value."""
        if isinstance(self.value, dict) and self.value:
            for key, child in self.value.items():
                yield from child.leaves(f"{path}.{key}" if path else key)
        else:
            yield path, self

    def find(self, path: str) -> Located | None:
        """The value at a dotted path, or None."""
        node = self
        for key in path.split("."):
            if not isinstance(node.value, dict) or key not in node.value:
                return None
            node = node.value[key]
        return node


class _Loader(yaml.SafeLoader):
    """YAML 1.2's idea of a scalar; see the module's docstring."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own class attribute


_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.inf|\.Inf|\.INF)$|\.(?:nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])


_RESOLVER = _Loader("")
"""Answers which tag a scalar has when its writer gave it none."""


class _Converter:
    """Turns composed nodes into Located values and collects what is wrong with them."""

    def __init__(self, source: str, problems: list[Problem], *, has_lines: bool = True, is_json: bool = False) -> None:
        self.source = source
        self.problems = problems
        self.has_lines = has_lines
        self.is_json = is_json
        self.count = 0

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.source, node.start_mark.line + 1 if self.has_lines else None)

    def problem(self, node: yaml.Node, what: str) -> None:
        self.problems.append(Problem(where=str(self.origin(node)), what=what))

    def convert(self, node: yaml.Node, depth: int = 0) -> Located | None:
        """The value of a node; None when it has none that can be read, which is then among the problems."""
        self.count += 1
        if depth > MAX_DEPTH:
            raise _one(str(self.origin(node)), f"nested deeper than {MAX_DEPTH} levels; is this the right file?")
        if self.count > MAX_NODES:
            raise _one(str(self.origin(node)), f"more than {MAX_NODES} values (aliases multiply); is this the right file?")
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if node.tag != _RESOLVER.resolve(type(node), node.value, (plain, not plain)):
            tag = node.tag.replace(_TAG, "!!")
            self.problem(node, f"the tag `{_shown(tag)}` has no meaning here; write the plain value, text in quotes")
            return None
        if isinstance(node, yaml.MappingNode):
            return Located(self._mapping(node, depth), self.origin(node))
        if isinstance(node, yaml.SequenceNode):
            items = [self.convert(child, depth + 1) for child in node.value]
            return Located([item for item in items if item is not None], self.origin(node))
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Located]:
        children: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                self.problem(key_node, "a key is a list or mapping; a key must be a word")
                continue
            if not key or not key.isprintable() or len(key) > MAX_KEY:
                self.problem(key_node, f"the key `{_shown(key)}` {_why_no_key(key)}")
                continue
            if key == "<<" and not self.is_json:
                self.problem(key_node, "`<<` (a merge key) has no meaning here; write the settings out")
                continue
            if key in children:
                first = children[key].origin.line
                self.problem(key_node, f"key `{key}` stands twice, first in line {first}; remove one of them")
            if _is_empty(value_node):
                self.problem(key_node, f"`{key}` has no value; write one, or remove the line")
                continue
            value = self.convert(value_node, depth + 1)
            if value is not None:
                # The line of a setting is that of its key: a block's own mark is where its first child stands.
                children[key] = Located(value.value, self.origin(key_node))
        return children

    def _scalar(self, node: yaml.ScalarNode) -> Located | None:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        value: Any = None
        wrong = None
        if kind == "int":
            digits = text.replace("_", "")
            if re.match(r"[-+]?0[0-9]", digits):
                number = digits.lstrip("+-0") or "0"
                wrong = f"has a leading zero, which YAML 1.1 reads as octal; write {number}, or quote it if it is text"
            elif len(digits) > 20 or abs(int(digits)) > MAX_INT:
                wrong = "is too large for any setting; write a smaller number, or quote it if it is text"
            else:
                value = int(digits)
        elif kind == "float":
            value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            if not math.isfinite(value):
                wrong = _NOT_FINITE
        elif kind == "bool":
            value = text.lower() == "true"
        elif kind == "str":
            # YAML keeps the halves of a JSON surrogate pair apart.
            value = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if self.is_json and node.style is None:  # the one unquoted word that json.loads lets through: NaN, Infinity
                wrong = _NOT_FINITE
            elif any(unicodedata.category(each) == "Cc" and each not in "\n\t" for each in value):
                wrong = "holds a control character; remove it"
        if wrong is not None:
            self.problem(node, f"{_shown(text)} {wrong}")
            return None
        return Located(value, self.origin(node))


_NOT_FINITE = "is not a finite number; write a finite one, leave the setting out, or quote it if it is text"


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""


def _why_no_key(key: str) -> str:
    if any(unicodedata.category(each) == "Zs" and each != " " for each in key):
        return "holds a non-breaking space, as copied from a web page; replace it with an ordinary one"
    return "is no name of a setting"


def read_yaml(path: str | Path, problems: list[Problem]) -> Located:
    """Read a run file.

    Args:
        path: the file.
        problems: takes what is wrong with single values, each with its line.

    Returns:
        A Located mapping of what could be read.

    Raises:
        ArgumentsError: the text cannot be read at all.
    """
    text = _read_text(path, "run file", "--config examples/quickstart_sft.yaml")
    source = str(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _one(f"{source}:{mark.line + 1}" if mark else source, _explain_yaml(error, text)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _one(f"{source}:{line}", f"holds the character U+{ord(text[error.position]):04X}; remove it") from None
    except RecursionError:
        raise _one(source, f"nested deeper than {MAX_DEPTH} levels; is this the right file?") from None
    return _root(node, _Converter(source, problems), "sections, such as `model:` on a line of its own")


def read_json(path: str | Path, problems: list[Problem]) -> Located:
    """Read a DeepSpeed JSON: standard JSON, so no comments, trailing commas or NaN.

    Args:
        path: the file.
        problems: takes what is wrong with single values, each with its line.

    Returns:
        A Located mapping of what could be read.

    Raises:
        ArgumentsError: the text cannot be read at all.
    """
    text = _read_text(path, "DeepSpeed JSON", "--deepspeed ds_configs/zero2.json")
    node = None
    try:
        if text.strip():
            json.loads(text, parse_int=str)  # as text: Python refuses to convert thousands of digits
            node = _json_node(text)
    except json.JSONDecodeError as error:
        line = _shown(text.split("\n")[error.lineno - 1].strip())
        raise _one(f"{path}:{error.lineno}", f"not valid JSON near `{line}`: {_explain_json(error, text)}") from None
    except RecursionError:
        raise _one(str(path), f"nested deeper than {MAX_DEPTH} levels; is this the right file?") from None
    return _root(node, _Converter(str(path), problems, is_json=True), '{"zero_optimization": {"stage": 2}}')


def read_override(text: str, problems: list[Problem]) -> tuple[str, Located | None]:
    """Read one `section.key=value` of the command line; the value is YAML.

    Returns:
        The dotted name, and the value unless it is among the problems.

    Raises:
        ArgumentsError: the text has no `=`, no name or a broken value.
    """
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
        raise _one("command line", f"`{_shown(text)}` is not section.key=value; write for example train.max_steps=100")
    converter = _Converter(f"--set {name}", problems, has_lines=False)
    try:
        node = yaml.compose(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise _one(
            "command line", f"the value of `{_shown(text)}` is not valid YAML; write text as {name}='\"text\"'"
        ) from None
    if node is None:
        raise _one("command line", f"`{name}=` has no value; write {name}=null to take back what the files say")
    return name, converter.convert(node)


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+')


def _json_node(text: str) -> yaml.Node:
    """Compose valid JSON. PyYAML's own composer wants a key and its colon on one line, and folds some characters."""
    tokens = _JSON_TOKEN.finditer(text)
    line, end = 0, 0

    def compose(token: re.Match[str]) -> yaml.Node:
        nonlocal line, end
        line, end = line + text.count("\n", end, token.start()), token.start()
        mark = yaml.Mark("", token.start(), line, 0, None, 0)
        word = token.group()
        if word == "{":
            pairs = []
            while (key := following()).group() != "}":
                key_node = compose(key)
                next(tokens)  # the colon
                pairs.append((key_node, compose(next(tokens))))
            return yaml.MappingNode(_TAG + "map", pairs, mark)
        if word == "[":
            items = []
            while (item := following()).group() != "]":
                items.append(compose(item))
            return yaml.SequenceNode(_TAG + "seq", items, mark)
        if word.startswith('"'):
            return yaml.ScalarNode(_TAG + "str", json.loads(word), mark, style='"')
        return yaml.ScalarNode(_RESOLVER.resolve(yaml.ScalarNode, word, (True, False)), word, mark)

    def following() -> re.Match[str]:
        token = next(tokens)
        return next(tokens) if token.group() == "," else token

    return compose(next(tokens))


def _root(node: yaml.Node | None, converter: _Converter, example: str) -> Located:
    if node is None or _is_empty(node):
        raise _one(converter.source, f"the file is empty; it must hold {example}")
    if not isinstance(node, yaml.MappingNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "single value"
        raise _one(str(converter.origin(node)), f"the file holds a {kind}; it must hold {example}")
    return converter.convert(node) or Located({}, converter.origin(node))


def _read_text(path: str | Path, what: str, example: str) -> str:
    path = Path(path)
    try:
        if path.is_dir():
            raise _one(str(path), f"is a folder; the {what} is a file. Write {example}")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _one(str(path), f"no such {what} ({path.absolute()}). Write {example}") from None
    except (OSError, ValueError) as error:
        raise _one(str(path), f"the {what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise _one(str(path), f"is larger than {MAX_BYTES >> 20} MiB; is this the {what}?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _one(f"{path}:{line}", f"byte {error.start} is not UTF-8; save the {what} as UTF-8") from None


def _explain_yaml(error: yaml.MarkedYAMLError, text: str) -> str:
    problem, context = str(error.problem), str(error.context)
    begin = error.context_mark.line + 1 if error.context_mark else None
    there = f" (it was opened in line {begin})" if begin and error.problem_mark and begin <= error.problem_mark.line else ""
    if "'\\t'" in problem:
        return "a tab; YAML wants spaces. Replace the tab with spaces"
    if "another document" in problem:
        return "a second document begins here; a run file holds one. Remove the line `---`"
    if "alias" in problem or "alias" in context or "anchor" in context or "cannot start any token" in problem:
        return "a value that begins with one of * & @ % ! or a backtick must stand in quotes"
    if "escape" in problem:
        return "a backslash in double quotes must be an escape; write the text in single quotes"
    if "mapping values are not allowed" in problem:
        return "a second `:` in the value, or a wrong indentation; quote the value, or align the line with its section"
    if "expected ':'" in problem:
        return "a line without `key: value`; check its colon, with a space behind it, and the quotes above"
    if "end of stream" in problem and "quoted" in context:
        return f"a quote is never closed{there}"
    if "flow" in context:
        return f"a comma or a closing bracket is missing before this{there}"
    if "expected <block end>" in problem:
        return "the line does not align with the others of its section; indent them equally"
    return f"not valid YAML: {problem or context}{there}; check indentation, quotes and brackets above this line"


def _explain_json(error: json.JSONDecodeError, text: str) -> str:
    rest, before = text[error.pos :], text[: error.pos].rstrip()
    if "trailing comma" in error.msg or (rest.startswith(("}", "]")) and before.endswith(",")):
        return "remove the comma before the closing bracket"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: remove it"
    if rest.startswith("'"):
        return "JSON wants double quotes"
    if word := re.match(r"True|False|None|TRUE|FALSE|nan|inf", rest):
        return f"JSON does not know {word.group()}; it has true, false and null"
    if error.msg == "Extra data":
        return "the JSON has already ended before this; remove it, or a bracket closes too early"
    if not rest.strip():
        return "a closing bracket is missing at the end"
    if "Invalid control character" in error.msg:
        return "a line break or tab inside quotes; close the quotes, or write \\n or \\t"
    return f"{error.msg[0].lower()}{error.msg[1:]}; check quotes, commas and brackets there and in the line above"


def _shown(text: str, limit: int = 60) -> str:
    """A piece of somebody's file, fit for a terminal."""
    text = "".join(each if each.isprintable() else "?" for each in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _one(where: str, what: str) -> ArgumentsError:
    return ArgumentsError([Problem(where=where, what=what)])
