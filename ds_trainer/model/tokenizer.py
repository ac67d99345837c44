"""Load the tokenizer and say clearly when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ds_trainer.arguments.schema import ModelSection
from ds_trainer.errors import ModelError


def load_tokenizer(model: ModelSection) -> Any:
    """Load the fast tokenizer that belongs to the model.

    Raises:
        ModelError: the folder holds no tokenizer, or only a slow one without offsets.
    """
    from transformers import AutoTokenizer

    path = model.tokenizer or model.path
    assert path is not None  # a constraint of the settings
    name = "model.tokenizer" if model.tokenizer else "model.path"
    require_folder(path, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and others for a missing tokenizer
        found = sorted(each.name for each in Path(path).iterdir()) if Path(path).is_dir() else ["tokenizer.json"]
        why = first_line(error) if "tokenizer.json" in found else f"the folder holds {', '.join(found[:6]) or 'nothing'}"
        raise ModelError(
            f"{name} = {path}: no tokenizer could be loaded ({why}). The folder must hold tokenizer.json; "
            "or name another one in model.tokenizer."
        ) from None
    if not tokenizer.is_fast or len(tokenizer) == 0:
        raise ModelError(
            f"{name} = {path}: this tokenizer has no tokenizer.json, which the loss mask needs for its offsets. "
            "Convert it once: AutoTokenizer.from_pretrained(PATH).save_pretrained(FOLDER)."
        )
    return tokenizer


def require_folder(path: str, setting: str) -> None:
    """Refuse what looks like a folder and is not there; a hub id has the form `owner/name`.

    Raises:
        ModelError: no such folder.
    """
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not Path(path).exists():
        raise ModelError(
            f"{setting} = {path}: no such folder ({Path(path).absolute()}). "
            "Write the path of a model folder relative to the current folder, or a hub id such as Qwen/Qwen3-0.6B."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, shortened; its type when it has no text."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
