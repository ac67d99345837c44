"""Read YAML and JSON so that every value remembers the file and line it stands on.

Both languages are read through PyYAML's composer, which keeps marks; JSON is first parsed by the standard library, which is
stricter than YAML. PyYAML's YAML 1.1 habits that surprise people are switched off: `1e-5` is a number, `on`, `yes`
and `12:30` are text, and `010` is refused instead of being read as 8.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ds_trainer.errors import ArgumentsError, Problem

MAX_DEPTH = 50
MAX_NODES = 100_000  # aliases multiply: without a limit a small file can fill the memory
MAX_BYTES = 4 * 1024 * 1024


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


class _Converter:
    """Turns composed nodes into Located values and collects what is wrong with them."""

    def __init__(self, source: str, *, has_lines: bool = True, is_json: bool = False) -> None:
        self.source = source
        self.has_lines = has_lines
        self.is_json = is_json
        self.problems: list[Problem] = []
        self.count = 0

    def origin(self, node: yaml.Node) -> Origin:
        return Origin(self.source, node.start_mark.line + 1 if self.has_lines else None)

    def problem(self, node: yaml.Node, what: str) -> None:
        self.problems.append(Problem(where=str(self.origin(node)), what=what))

    def convert(self, node: yaml.Node, depth: int = 0) -> Located:
        self.count += 1
        if self.count > MAX_NODES or depth > MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self.count > MAX_NODES else f"{MAX_DEPTH} levels"
            self.problem(node, f"more than {limit}; a settings file has a few dozen. Is this the right file?")
            raise ArgumentsError(self.problems)
        if isinstance(node, yaml.MappingNode):
            return Located(self._mapping(node, depth), self.origin(node))
        if isinstance(node, yaml.SequenceNode):
            return Located([self.convert(child, depth + 1) for child in node.value], self.origin(node))
        assert isinstance(node, yaml.ScalarNode)
        return Located(self._scalar(node), self.origin(node))

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Located]:
        children: dict[str, Located] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                self.problem(key_node, "a key is a list or mapping; a key must be a word")
                continue
            if key in children:
                self.problem(
                    key_node, f"key `{key}` stands twice, first in line {children[key].origin.line}; remove one of them"
                )
            value = self.convert(value_node, depth + 1)
            # The line of a setting is that of its key: a block's own mark is where its first child stands.
            children[key] = Located(value.value, self.origin(key_node))
        return children

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "int":
            digits = text.replace("_", "")
            if re.match(r"[-+]?0[0-9]", digits):
                self.problem(node, f"{text} has a leading zero, which YAML 1.1 reads as octal; write {int(digits)}")
            return int(digits) if len(digits) < 40 else self._refuse_number(node)
        if kind == "float":
            value = float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            return value if math.isfinite(value) else self._refuse_number(node)
        if kind == "bool":
            return text.lower() == "true"
        if kind == "null":
            return None
        if kind != "str":
            self.problem(node, f"the tag {node.tag} has no meaning here; write the plain value")
        if self.is_json and node.style is None:  # the one unquoted word that json.loads lets through: NaN, Infinity
            return self._refuse_number(node)
        # YAML keeps the halves of a JSON surrogate pair apart.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _refuse_number(self, node: yaml.Node) -> None:
        self.problem(node, f"{node.value[:40]} is not a finite number; write a finite one, or leave the setting out")


def read_yaml(path: str | Path) -> Located:
    """Read a run file.

    Returns:
        A Located mapping.

    Raises:
        ArgumentsError: with every problem that the text itself shows, each with its line.
    """
    text = _read_text(path, "run file", "--config examples/pretrain.yaml")
    return _compose(text, str(path), "section: {key: value}, as in `model:` on a line of its own")


def read_json(path: str | Path) -> Located:
    """Read a DeepSpeed JSON: standard JSON, so no comments, trailing commas or NaN.

    Raises:
        ArgumentsError: with every problem that the text itself shows, each with its line.
    """
    text = _read_text(path, "DeepSpeed JSON", "--deepspeed ds_configs/zero2.json")
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip()[:60] if text.strip() else ""
        raise _one(f"{path}:{error.lineno}", f"not valid JSON ({error.msg}) near `{line}`; {_json_hint(line)}") from None
    except RecursionError:
        raise _one(str(path), f"nested deeper than {MAX_DEPTH} levels; is this the right file?") from None
    # Tabs may only stand between tokens in valid JSON, and PyYAML refuses them there.
    return _compose(text.replace("\t", " "), str(path), '{"zero_optimization": {"stage": 2}}', is_json=True)


def read_override(text: str) -> tuple[str, Located]:
    """Read one `section.key=value` of the command line; the value is YAML.

    Raises:
        ArgumentsError: the text has no `=`, no dotted name or a broken value.
    """
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        raise _one("command line", f"`{text}` is not section.key=value; write for example train.max_steps=100")
    converter = _Converter(f"--set {name}", has_lines=False)
    try:
        node = yaml.compose(value, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        raise _one("command line", f"the value of `{text}` is not valid YAML; quote it, as in {name}='\"text\"'") from None
    located = Located(None, Origin(f"--set {name}")) if node is None else converter.convert(node)
    if converter.problems:
        raise ArgumentsError(converter.problems)
    return name, located


def _read_text(path: str | Path, what: str, example: str) -> str:
    path = Path(path)
    try:
        if path.is_dir():
            raise _one(str(path), f"is a folder; the {what} is a file. Write {example}")
        if path.exists() and path.stat().st_size > MAX_BYTES:
            raise _one(str(path), f"is larger than {MAX_BYTES >> 20} MiB; is this the {what}?")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise _one(str(path), f"no such {what} ({path.absolute()}). Write {example}") from None
    except (OSError, ValueError) as error:
        raise _one(str(path), f"the {what} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _one(f"{path}:{line}", f"byte {error.start} is not UTF-8; save the {what} as UTF-8") from None


def _compose(text: str, source: str, example: str, *, is_json: bool = False) -> Located:
    converter = _Converter(source, is_json=is_json)
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise _one(where, _explain_yaml(error, text.splitlines()[mark.line : mark.line + 1] if mark else [])) from None
    except yaml.YAMLError as error:  # a character YAML does not allow
        raise _one(source, f"not readable as text: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise _one(source, f"nested deeper than {MAX_DEPTH} levels; is this the right file?") from None
    if node is None:
        raise _one(source, f"the file is empty; it must hold {example}")
    located = converter.convert(node)
    if not isinstance(located.value, dict):
        kind = "list" if isinstance(located.value, list) else "single value"
        converter.problem(node, f"the file holds a {kind}; it must be a mapping: {example}")
    if converter.problems:
        raise ArgumentsError(converter.problems)
    return located


def _explain_yaml(error: yaml.MarkedYAMLError, lines: list[str]) -> str:
    if lines and "\t" in lines[0]:
        return "a tab in the indentation; YAML allows only spaces there. Replace the tab with spaces"
    if error.problem and "mapping values are not allowed" in error.problem:
        return "a second `:` in the value, or a wrong indentation; quote the value, or align the line with its section"
    return f"not valid YAML: {error.problem or error.context}; check indentation, quotes and brackets above this line"


def _json_hint(line: str) -> str:
    if "//" in line or "#" in line or "/*" in line:
        return "JSON has no comments: remove it"
    if line.startswith(("}", "]")):
        return "remove the comma before it"
    return "check quotes, commas and brackets there and in the line above"


def _one(where: str, what: str) -> ArgumentsError:
    return ArgumentsError([Problem(where=where, what=what)])
