"""Slices of named tensors on disk, one safetensors file a rank, and any other slice of them read back.

Who wrote which piece does not matter to who reads: a rank asks for elements [start, stop) of a parameter and gets them, from
however many files they lie in. That is all that a resume on another number of ranks or at another ZeRO stage needs.
Source of the file format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_trainer import faults
from ds_trainer.checkpoint.layout import HASH, HASHES

SliceKey = tuple[str, str, int]
"""(parameter, kind, start): `kind` says what of the parameter, `start` where in its flattened elements the slice begins."""

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.bool: "BOOL"}
_CHUNK_BYTES = 4 << 20


def file_name(rank: int) -> str:
    """The file that a rank writes its slices into."""
    return f"rank_{rank:05d}.safetensors"


def write_slices(path: Path, slices: Mapping[SliceKey, Tensor], moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write a safetensors file through to the disk.

    The library would hold every byte a second time and hash nothing.

    Args:
        path: the file.
        slices: 1-D tensors on the CPU.
        moved: called whenever a few MiB were written.

    Returns:
        Size in bytes and hash, as in a manifest.
    """
    header: dict[str, Any] = {}
    end = 0
    for key, value in slices.items():
        start, end = end, end + value.numel() * value.element_size()
        header[_join(key)] = {"dtype": _DTYPES[value.dtype], "shape": [value.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = HASHES[HASH]()
    with path.open("wb", buffering=0) as file:
        for chunk in _chunks(len(text).to_bytes(8, "little") + text, slices.values()):
            content.update(chunk)
            _write(file, chunk)
            moved()
            faults.point("save_half_written")
        faults.point("save_before_fsync")
        os.fsync(file.fileno())
        return {"bytes": file.tell(), HASH: content.hexdigest()}


def _write(file: FileIO, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[file.write(chunk) :]


def _chunks(head: bytes, tensors: Iterable[Tensor]) -> Iterable[memoryview]:
    yield memoryview(head)
    for tensor in tensors:
        raw = memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")  # type: ignore[arg-type]
        for start in range(0, len(raw), _CHUNK_BYTES):
            yield raw[start : start + _CHUNK_BYTES]


class SliceReader:
    """Reads any slice of what some files hold together."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Open the files; their headers are read, no data.

        Raises:
            OSError, ValueError: a file is missing or no safetensors file.
        """
        from safetensors import SafetensorError, safe_open

        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for path in files:
            try:
                reader = safe_open(path, framework="pt")
                for joined in reader.keys():  # noqa: SIM118 - not a dict
                    name, kind, start = _split(joined)
                    (numel,) = reader.get_slice(joined).get_shape()
                    self._pieces[name, kind].append((start, start + numel, reader, joined))
            except SafetensorError as error:
                raise ValueError(f"{path} is no safetensors file ({error})") from None
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def read(self, name: str, kind: str, start: int, target: Tensor) -> bool:
        """Fill a tensor with elements [start, start + n) of a parameter.

        Args:
            name: of the parameter.
            kind: what of it.
            start: the first element.
            target: (n,), of any float type and on any device.

        Returns:
            False, and the target is left alone, when the files hold nothing of that kind of this parameter.

        Raises:
            ValueError: they hold some of it, but not these elements.
        """
        if (name, kind) not in self._pieces:
            return False
        position, stop = start, start + target.numel()
        for first, last, reader, joined in self._pieces[name, kind]:
            if first <= position < min(last, stop):
                until = min(last, stop)
                target[position - start : until - start].copy_(reader.get_slice(joined)[position - first : until - first])
                position = until
        if position < stop:
            raise ValueError(f"elements {position} to {stop} of {name} ({kind}) are in no file")
        return True

    def numel(self, name: str, kind: str) -> int | None:
        """How many elements there are of a parameter; None when there is none."""
        pieces = self._pieces.get((name, kind))
        return max(last for _, last, _, _ in pieces) if pieces else None

    def names(self, kind: str) -> list[str]:
        """The parameters of which there is that kind."""
        return sorted(name for name, each in self._pieces if each == kind)


def _join(key: SliceKey) -> str:
    name, kind, start = key
    return f"{name}|{kind}|{start}"


def _split(joined: str) -> SliceKey:
    name, kind, start = joined.rsplit("|", 2)
    return name, kind, int(start)
