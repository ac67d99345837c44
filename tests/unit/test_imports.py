"""Imports point down only (docs: architecture): read from the source, so that no import has to run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ds_trainer"
PLAIN = {"arguments", "launch", "errors", "faults", "meeting", "whereabouts"}
GROUND = {"comm", "nonfinite", "protocols", "state"}
PARTS = {"engine", "data", "model", "objectives", "checkpoint", "monitor"}
LOOP = {"loop"}
STORIES = {
    *(
        "train",
        "recovery",
        "agreement",
        "debug",
        "check",
        "export",
        "prepare",
        "assemble",
        "completions",
        "run_data",
        "verify",
        "doctor",
        "plan",
    ),
    *("endings", "out_of_memory", "precompute"),
}
TOP = {"cli", "__main__", "__init__"}
HEAVY = {"torch", "deepspeed", "transformers", "peft", "datasets", "numpy", "safetensors", "tokenizers"}

MAY_IMPORT = {
    **dict.fromkeys(PLAIN, PLAIN),
    **dict.fromkeys(GROUND, PLAIN | GROUND),
    **{part: PLAIN | GROUND | {part} for part in PARTS},
    # The loop is handed the parts; it may name their values only through protocols.
    **dict.fromkeys(LOOP, PLAIN | GROUND),
    **dict.fromkeys(STORIES, PLAIN | GROUND | PARTS | LOOP | STORIES),
    **dict.fromkeys(TOP, PLAIN | GROUND | PARTS | LOOP | STORIES | TOP),
}


def home(path: Path) -> str:
    """The first name below the package: a file of its own or a folder."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


class Imports(ast.NodeVisitor):
    """Every import of a file: (module, line, whether it runs when the file is imported)."""

    def __init__(self, path: Path) -> None:
        self.found: list[tuple[str, int, bool]] = []
        self.depth = 0
        self.visit(ast.parse(path.read_text(), str(path)))

    def add(self, module: str, node: ast.stmt) -> None:
        self.found.append((module, node.lineno, self.depth == 0))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports hide which part is meant"
        for alias in node.names:  # `from ds_trainer import comm` imports the module ds_trainer.comm
            self.add(f"{node.module}.{alias.name}" if node.module == "ds_trainer" else str(node.module), node)

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):  # what only the type checker reads imports nothing
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
            self.found.append((str(node.args[0].value), node.lineno, self.depth == 0))
        self.generic_visit(node)


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = {path: Imports(path).found for path in FILES}
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]


def test_every_module_has_its_place():
    assert {home(path) for path in FILES} <= MAY_IMPORT.keys(), "a new module: say here which layer it belongs to"
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down_only(path):
    allowed = MAY_IMPORT[home(path)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for module, line, _ in IMPORTS[path]
        if module.startswith("ds_trainer.") and module.split(".")[1] not in allowed | {"__version__"}
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "path", [each for each in FILES if home(each) in PLAIN | {"cli", "__main__", "__init__", "check"}], ids=str
)
def test_what_refuses_a_wrong_run_imports_nothing_heavy(path):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module} when it is imported"
        for module, line, at_once in IMPORTS[path]
        if at_once and module.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_the_command_line_imports_its_stories_when_they_are_told():
    for name in ("cli.py", "__main__.py"):
        at_once = {module for module, _, at_once in IMPORTS[PACKAGE / name] if at_once and module.startswith("ds_trainer")}
        assert at_once <= {"ds_trainer.__version__", "ds_trainer.errors", "ds_trainer.cli"}


def test_only_the_engine_is_written_against_deepspeed():
    users = {path for path in FILES if any(module.split(".")[0] == "deepspeed" for module, *_ in IMPORTS[path])}
    allowed = {PACKAGE / "arguments" / "deepspeed_keys.py"} | {path for path in FILES if home(path) == "engine"}
    assert users <= allowed
    source = (PACKAGE / "arguments" / "deepspeed_keys.py").read_text()
    functions = {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any("deepspeed." in ast.unparse(each) for each in node.body if isinstance(each, ast.ImportFrom))
    }
    assert functions <= {"_class_problems"}, "only what validate_blocks calls"


def test_no_module_of_arguments_loads_anything_heavy_when_imported():
    modules = [f"ds_trainer.arguments.{path.stem}" for path in FILES if home(path) == "arguments"]
    modules += ["ds_trainer.check", "ds_trainer.cli"]
    code = f"import sys, {', '.join(modules)}; print(sorted({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
