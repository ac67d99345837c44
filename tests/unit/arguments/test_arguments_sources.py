"""Reading YAML and JSON: every value keeps its line, and a bad text is named by line, rule and remedy."""

import contextlib
import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ds_trainer.arguments.sources import MAX_DEPTH, read_json, read_override, read_yaml
from ds_trainer.errors import ArgumentsError


def read(name: str, content: str | bytes):
    """The tree and the problems of a file with this content; a text that cannot be read has no tree."""
    Path(name).write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    problems: list = []
    try:
        tree = (read_json if name.endswith("json") else read_yaml)(name, problems)
    except ArgumentsError as error:
        return None, [*map(str, problems), *map(str, error.problems)]
    return tree, [*map(str, problems)]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("3E4", 3e4),
        ("1e5", 1e5),
        ("5e8", 5e8),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("8", 8),
        ("-8", -8),
        ("1_000", 1000),
        ("0", 0),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("12:30:45", "12:30:45"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("0o10", "0o10"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("=", "="),
        ('"8"', "8"),
        ('"1e-5"', "1e-5"),
        ("'true'", "true"),
        ("null", None),
        ("~", None),
        ('""', ""),
        (r'"\ud83d\ude00"', "\U0001f600"),
    ],
)
def test_a_yaml_scalar_is_what_people_expect(written, value):
    tree, problems = read("run.yaml", f"a: {written}\n")
    assert problems == []
    assert tree.find("a").value == value
    assert type(tree.find("a").value) is type(value)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("010", "010 has a leading zero, which YAML 1.1 reads as octal; write 10, or quote it if it is text"),
        ("-007", "write 7"),
        ("00", "write 0"),
        (".inf", ".inf is not a finite number"),
        ("-.inf", "-.inf is not a finite number"),
        (".NaN", ".NaN is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("9" * 30, "is too large for any setting"),
        (str(2**63), "is too large for any setting"),
        ("9" * 9000, "is too large for any setting"),
        ("", "`b` has no value; write one, or remove the line"),
        ("!!int abc", "the tag `!!int` has no meaning here; write the plain value"),
        ("!!float abc", "the tag `!!float` has no meaning here"),
        ("!!bool abc", "the tag `!!bool` has no meaning here"),
        ("!!null abc", "the tag `!!null` has no meaning here"),
        ("!!python/object/apply:os.system [echo]", "the tag `!!python/object/apply:os.system` has no meaning here"),
        ("!!set {x, y}", "the tag `!!set` has no meaning here"),
        ("!mine x", "the tag `!mine` has no meaning here"),
        (r'"a\x1b[31mb"', "holds a control character"),
        (r'"a\0b"', "holds a control character"),
    ],
)
def test_a_yaml_scalar_that_has_to_be_guessed_at_is_refused_with_its_line(written, words):
    tree, problems = read("run.yaml", f"a: 1\nb: {written}\nc: 3\n")
    assert len(problems) == 1
    assert problems[0].startswith("run.yaml:2: ")
    assert words in problems[0]
    assert tree.plain() == {"a": 1, "c": 3}, "the rest is read all the same, so that everything wrong is shown at once"


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("NaN", "NaN is not a finite number"),
        ("Infinity", "Infinity is not a finite number"),
        ("-Infinity", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("1" * 5000, "is too large for any setting"),
        (r'"\u0000"', "holds a control character"),
        (r'"\u001b[2J"', "holds a control character"),
    ],
)
def test_a_json_value_that_no_setting_can_have_is_refused_with_its_line(written, words):
    tree, problems = read("ds.json", f'{{"a": 1,\n "b": {written},\n "c": 3}}')
    assert len(problems) == 1
    assert problems[0].startswith("ds.json:2: ")
    assert words in problems[0]
    assert tree.plain() == {"a": 1, "c": 3}


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("", "run.yaml", "the file is empty; it must hold sections"),
        ("# only a comment\n", "run.yaml", "the file is empty"),
        ("---\n", "run.yaml", "the file is empty"),
        ("- a\n- b\n", "run.yaml:1", "the file holds a list"),
        ("\n\nhello", "run.yaml:3", "the file holds a single value"),
        ("model:\n\tpath: x\n", "run.yaml:2", "a tab; YAML wants spaces"),
        ("model:\n  path: x\t# why\n", "run.yaml:2", "a tab; YAML wants spaces"),
        ("a: 1\n---\nb: 2\n", "run.yaml:2", "a second document begins here; a run file holds one"),
        ('a: "open\nb: 2\n', "run.yaml:3", "a quote is never closed (it was opened in line 1)"),
        ("a: [1, 2\nb: 2\n", "run.yaml:2", "a comma or a closing bracket is missing before this (it was opened in line 1)"),
        ("a: x: y\n", "run.yaml:1", "a second `:` in the value"),
        ("a:\n  b: 1\n c: 2\n", "run.yaml:3", "does not align"),
        ("a: *.jsonl\n", "run.yaml:1", "must stand in quotes"),
        ("a: @x\n", "run.yaml:1", "must stand in quotes"),
        ("a: `x`\n", "run.yaml:1", "must stand in quotes"),
        ("a: *undefined\n", "run.yaml:1", "must stand in quotes"),
        ('a: "C:\\models"\n', "run.yaml:1", "write the text in single quotes"),
        ("a: 1\nb: c\x07d\n", "run.yaml:2", "holds the character U+0007; remove it"),
        ("a: 1\nb: c\x00d\n", "run.yaml:2", "holds the character U+0000; remove it"),
        ("a: 1\nb: c\x7fd\n", "run.yaml:2", "holds the character U+007F; remove it"),
        (b"a: 1\nb: mod\xe8le\n", "run.yaml:2", "byte 11 is not UTF-8; save the run file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "run.yaml:1", "is not UTF-8"),
        ("a: " + "[" * 3000 + "]" * 3000, "run.yaml", f"nested deeper than {MAX_DEPTH} levels"),
        ("[" * 100_000, "run.yaml", f"nested deeper than {MAX_DEPTH} levels"),
        ("".join("  " * depth + "a:\n" for depth in range(60)), "run.yaml:52", f"nested deeper than {MAX_DEPTH} levels"),
        ("a: &a [*a]\n", "run.yaml:1", f"nested deeper than {MAX_DEPTH} levels"),
        (b"#" * (2 << 20), "run.yaml", "is larger than 1 MiB; is this the run file?"),
    ],
)
def test_an_unreadable_run_file_is_refused_in_one_line_that_helps(text, where, words):
    tree, problems = read("run.yaml", text)
    assert tree is None
    assert len(problems) == 1
    assert problems[0].startswith(f"{where}: ")
    assert words in problems[0]


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("", "ds.json", 'the file is empty; it must hold {"zero_optimization"'),
        (" \n ", "ds.json", "the file is empty"),
        ("[]", "ds.json:1", "the file holds a list"),
        ("null", "ds.json:1", "the file holds a single value"),
        ('{\n "a": 1,\n}', "ds.json:3", "remove the comma before the closing bracket"),
        ('{"a": [1,]}', "ds.json:1", "remove the comma before the closing bracket"),
        ('{\n // why\n "a": 1}', "ds.json:2", "JSON has no comments: remove it"),
        ('{\n "a": 1, # why\n "b": 2}', "ds.json:2", "JSON has no comments: remove it"),
        ('{\n /* why */ "a": 1}', "ds.json:2", "JSON has no comments: remove it"),
        ("{'a': 1}", "ds.json:1", "JSON wants double quotes"),
        ('{"a": True}', "ds.json:1", "JSON does not know True; it has true, false and null"),
        ('{"a": 1} {"b": 2}', "ds.json:1", "the JSON has already ended before this"),
        ('{"a": 1\n', "ds.json:2", "a closing bracket is missing at the end"),
        ('{"a": "x\n"}', "ds.json:1", "a line break or tab inside quotes"),
        ('{"a" 1}', "ds.json:1", "expecting ':' delimiter"),
        ('{"a": 01}', "ds.json:1", 'not valid JSON near `{"a": 01}`'),
        (b'{"a":\n "\xe9"}', "ds.json:2", "byte 8 is not UTF-8; save the DeepSpeed JSON as UTF-8"),
        ('{"a":' * 60 + "1" + "}" * 60, "ds.json:1", f"nested deeper than {MAX_DEPTH} levels"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "ds.json", f"nested deeper than {MAX_DEPTH} levels"),
        ("[" * 100_000, "ds.json", f"nested deeper than {MAX_DEPTH} levels"),
    ],
)
def test_an_unreadable_json_is_refused_in_one_line_that_helps(text, where, words):
    tree, problems = read("ds.json", text)
    assert tree is None
    assert len(problems) == 1
    assert problems[0].startswith(f"{where}: ")
    assert words in problems[0]


def test_an_alias_bomb_is_refused_before_it_fills_the_memory():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    tree, problems = read("run.yaml", "\n".join(rows))
    assert tree is None
    assert "more than 100000 values (aliases multiply)" in problems[-1]


@pytest.mark.parametrize("name", ["run.yaml", "ds.json"])
def test_equal_keys_are_refused_with_both_lines_at_every_depth(name):
    text = '{"a": 1,\n "b": {"c": 1,\n   "c": 2},\n "a": 3}'
    _, problems = read(name, text)
    assert problems == [
        f"{name}:3: key `c` stands twice, first in line 2; remove one of them",
        f"{name}:4: key `a` stands twice, first in line 1; remove one of them",
    ]


def test_a_merge_key_is_refused_because_its_lines_would_be_someone_elses():
    _, problems = read("run.yaml", "base: &base {stage: sft}\ntrain:\n  <<: *base\n")
    assert problems == ["run.yaml:3: `<<` (a merge key) has no meaning here; write the settings out"]


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ('"a\\u00a0b"', "holds a non-breaking space, as copied from a web page"),
        ('""', "is no name of a setting"),
        ('"a\\u001bb"', "the key `a?b` is no name of a setting"),
        ('"' + "k" * 500 + '"', "kkk...` is no name of a setting"),
    ],
)
@pytest.mark.parametrize("name", ["run.yaml", "ds.json"])
def test_a_key_that_cannot_be_shown_is_refused(name, key, words):
    _, problems = read(name, f"{{{key}: 1}}")
    assert len(problems) == 1
    assert words in problems[0]


def test_keys_and_values_keep_their_lines_whatever_the_layout():
    tree, problems = read(
        "ds.json", '{"a"\n:\n1,\n\t"b":\n\n\t{"c": [1,\n2]}, "u": "\u2028\u0085",\n"d": {}}'.replace("\u0085", "")
    )
    assert problems == []
    lines = {path: node.origin.line for path, node in tree.leaves()}
    assert lines == {"a": 1, "b.c": 6, "u": 7, "d": 8}
    assert tree.find("b").origin.line == 4, "a block stands where its key stands"
    assert tree.plain() == {"a": 1, "b": {"c": [1, 2]}, "u": "\u2028", "d": {}}


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**6), 10**6)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=("Cs", "Cc"))),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), inner, max_size=4)
        ),
    ).map(lambda value: {"root": value}),
    st.sampled_from([None, 1, "\t"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_valid_json_reads_as_the_standard_library_reads_it(value, indent):
    tree, problems = read("ds.json", json.dumps(value, indent=indent))
    assert problems == []
    assert tree.plain() == value


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"a: !!int x")
@example(b"? [a]\n: b")
@example(b"a: &a {b: *a}")
@example(b"%YAML 3.0\n---\na: 1")
@example(b'{"a": ' + b"1" * 5000 + b"}")
@example(b"!!map [a]")
@example(b'{"\\ud800": "\\udfff"}')
@example(b"a: \xed\xa0\x80")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_content_raises_anything_but_arguments_error(content):
    for name in ("run.yaml", "ds.json"):
        _, problems = read(name, content)
        for problem in problems:
            assert problem.startswith(name)
            assert problem.replace("\n", "").isprintable(), "nothing in a file can steer the terminal"


_WORDS = ("&x ", "*x", "!!int ", "!y ", "? ", "---\n", "...", "1e5", "010", ".nan", "<<", "\ufeff", "\u2028")
_YAML_PIECES = st.sampled_from([*"ab\n[]{}\"'#|>%~\t=\\", ": ", ":\n", "  ", "- ", ", ", *_WORDS])


@given(st.lists(_YAML_PIECES, max_size=14).map("".join))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_near_yaml_raises_anything_but_arguments_error(text):
    read("run.yaml", text)
    with contextlib.suppress(ArgumentsError):
        read_override(f"a.b={text}", [])


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert read("run.yaml", b"\xef\xbb\xbfa: 1\n")[0].plain() == {"a": 1}
    assert read("ds.json", b'\xef\xbb\xbf{"a": 1}')[0].plain() == {"a": 1}


def test_windows_line_ends_count_as_one_line():
    _, problems = read("run.yaml", "a: 1\r\nb: 010\r\n")
    assert problems[0].startswith("run.yaml:2: ")
    _, problems = read("ds.json", '{"a": 1,\r\n"b": NaN}')
    assert problems[0].startswith("ds.json:2: ")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such run file ("),
        (lambda path: path.mkdir(), "is a folder; the run file is a file. Write --config examples/"),
        (lambda path: path.symlink_to("nowhere"), "no such run file ("),
        (lambda path: path.symlink_to(path), "the run file cannot be read: "),
    ],
    ids=["missing", "folder", "broken link", "link to itself"],
)
def test_what_is_no_readable_file_is_named_as_such(tmp_path, make, words):
    make(tmp_path / "run.yaml")
    with pytest.raises(ArgumentsError) as caught:
        read_yaml("run.yaml", [])
    assert str(caught.value.problems[0]).startswith("run.yaml: ")
    assert words in str(caught.value)


def test_a_file_without_permission_is_named_as_such():
    path = Path("run.yaml")
    path.write_text("a: 1\n")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(ArgumentsError, match="the run file cannot be read: Permission denied"):
        read_yaml(path, [])


def test_an_endless_file_is_not_read_to_its_end():
    if not (os.path.exists("/dev/zero") and stat.S_ISCHR(os.stat("/dev/zero").st_mode)):
        pytest.skip("no /dev/zero here")
    with pytest.raises(ArgumentsError, match="is larger than 1 MiB"):
        read_json("/dev/zero", [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.max_steps", "`train.max_steps` is not section.key=value; write for example train.max_steps=100"),
        ("=3", "is not section.key=value"),
        ("train.=3", "is not section.key=value"),
        ("train..a=3", "is not section.key=value"),
        ("train.max_steps = 5", "is not section.key=value"),
        ("train.max_steps:3", "is not section.key=value"),
        ("train.max_steps=", "`train.max_steps=` has no value; write train.max_steps=null"),
        ("train.max_steps=[1", "the value of `train.max_steps=[1` is not valid YAML"),
        ("train.max_steps=\x00", "the value of `train.max_steps=?` is not valid YAML"),
        ("a\x1b[2J=3", "`a?[2J=3` is not section.key=value"),
    ],
)
def test_an_override_that_is_none_is_refused_with_an_example(text, words):
    with pytest.raises(ArgumentsError) as caught:
        read_override(text, [])
    assert str(caught.value.problems[0]).startswith("command line: ")
    assert words in str(caught.value)


def test_the_value_of_an_override_is_yaml_and_remembers_the_command_line():
    name, node = read_override("train.betas=[0.9, 1e-1]", [])
    assert (name, node.plain(), str(node.origin)) == ("train.betas", [0.9, 0.1], "--set train.betas")
    problems: list = []
    assert read_override("train.max_steps=010", problems) == ("train.max_steps", None)
    assert [str(each) for each in problems] == [
        "--set train.max_steps: 010 has a leading zero, which YAML 1.1 reads as octal; write 10, or quote it if it is text"
    ]
