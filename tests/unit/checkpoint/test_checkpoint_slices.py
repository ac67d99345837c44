"""What was written in pieces is read back in any other pieces; the files are plain safetensors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_trainer.checkpoint.slices import SliceReader, file_name, write_slices


def cuts(total: int, positions: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, total, *(each % (total + 1) for each in positions)})
    return list(itertools.pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(1, 300),
    written=st.lists(st.integers(0, 300), max_size=6),
    asked=st.lists(st.integers(0, 300), max_size=6),
    files=st.integers(1, 3),
)
def test_any_slice_of_a_parameter_is_read_from_any_pieces(tmp_path_factory, total, written, asked, files):
    folder = tmp_path_factory.mktemp("slices")
    values = torch.rand(total)
    pieces: list[dict] = [{} for _ in range(files)]
    for index, (start, stop) in enumerate(cuts(total, written)):
        pieces[index % files]["a|b.weight", "fp32", start] = values[start:stop]
    for rank, each in enumerate(pieces):
        write_slices(folder / file_name(rank), each)
    reader = SliceReader(sorted(folder.iterdir()))
    assert reader.numel("a|b.weight", "fp32") == total
    for start, stop in cuts(total, asked):
        target = torch.full((stop - start,), torch.nan)
        assert reader.read("a|b.weight", "fp32", start, target)
        assert torch.equal(target, values[start:stop])


def test_the_file_is_what_the_library_writes_and_reads(tmp_path):
    from safetensors.torch import load_file

    tensors = {("w", "fp32", 0): torch.rand(5), ("w", "bf16", 7): torch.rand(3).bfloat16(), ("n", "buffer", 0): torch.arange(4)}
    tensors["nothing", "fp32", 0] = torch.empty(0)
    entry = write_slices(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert entry["bytes"] == (tmp_path / "a.safetensors").stat().st_size
    assert {tuple(name.rsplit("|", 2)) for name in loaded} == {(name, kind, str(start)) for name, kind, start in tensors}
    for (name, kind, start), value in tensors.items():
        assert torch.equal(loaded[f"{name}|{kind}|{start}"], value)


def test_the_hash_is_that_of_the_bytes_on_the_disk(tmp_path):
    import xxhash

    big = torch.rand(3_000_000)  # more than one chunk, and not a whole number of them
    entry = write_slices(tmp_path / "a", {("w", "fp32", 0): big})
    assert entry["xxh3_128"] == xxhash.xxh3_128((tmp_path / "a").read_bytes()).hexdigest()


def test_elements_that_no_file_holds_are_an_error_and_an_unknown_parameter_is_not(tmp_path):
    write_slices(tmp_path / "a", {("w", "fp32", 0): torch.zeros(4), ("w", "fp32", 6): torch.zeros(4)})
    reader = SliceReader([tmp_path / "a"])
    assert not reader.read("other", "fp32", 0, torch.empty(1))
    with pytest.raises(ValueError, match=r"elements 4 to 8 of w \(fp32\) are in no file"):
        reader.read("w", "fp32", 2, torch.empty(6))


def test_what_is_no_safetensors_file_is_never_unpickled(tmp_path):
    class Gadget:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    torch.save({"w|fp32|0": Gadget()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        SliceReader([tmp_path / "a.safetensors"])
    assert not (tmp_path / "canary").exists()
