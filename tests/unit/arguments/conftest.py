import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ds_trainer.arguments.merge import Resolved, resolve
from ds_trainer.errors import ArgumentsError

SECTIONS: dict[str, list[str]] = {
    "model": ["path: some/model"],
    "data": ["sources: [{path: a.jsonl}]", "seq_len: 128"],
    "train": ["stage: sft", "max_steps: 100"],
    "checkpoint": ["folder: out/x"],
}


class Files:
    """A run file and a DeepSpeed JSON in an empty current folder, and what the arguments make of them."""

    def __init__(self) -> None:
        self.has_json = False
        self.text = ""

    def run(self, text: str | bytes | None = None, **extra: Sequence[str]) -> "Files":
        """Write run.yaml: `text`, or the smallest valid one with more lines in some sections."""
        if text is None:
            sections = {name: [*SECTIONS.get(name, []), *extra.get(name, [])] for name in (*SECTIONS, *extra)}
            text = "".join(f"{name}:\n" + "".join(f"  {line}\n" for line in lines) for name, lines in sections.items())
        self.text = text if isinstance(text, str) else text.decode(errors="replace")
        Path("run.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return self

    def json(self, content: Any) -> "Files":
        """Write ds.json: text and bytes as they are, anything else with one value a line."""
        raw = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content, indent=1)).encode()
        )
        Path("ds.json").write_bytes(raw)
        self.has_json = True
        return self

    def line(self, words: str, file: str = "run.yaml") -> str:
        """`file:line` of the one line that holds these words."""
        numbers = [at for at, line in enumerate(Path(file).read_text().split("\n"), 1) if words in line]
        assert len(numbers) == 1, f"{words!r} stands in {len(numbers)} lines of {file}"
        return f"{file}:{numbers[0]}"

    def resolve(self, *overrides: str, **options: Any) -> Resolved:
        if not Path("run.yaml").exists():
            self.run()
        return resolve("run.yaml", deepspeed="ds.json" if self.has_json else None, overrides=overrides, **options)

    def problems(self, *overrides: str, **options: Any) -> list[str]:
        """What is wrong, a line each; fails when nothing is."""
        with pytest.raises(ArgumentsError) as caught:
            self.resolve(*overrides, **options)
        assert caught.value.exit_code == 2
        return [str(problem) for problem in caught.value.problems]

    def problem(self, *overrides: str, **options: Any) -> str:
        """The one thing that is wrong."""
        found = self.problems(*overrides, **options)
        assert len(found) == 1, "\n".join(found)
        return found[0]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.chdir(tmp_path)
    return Files()
