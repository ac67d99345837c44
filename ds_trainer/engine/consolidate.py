"""Read the trained weights out of a DeepSpeed checkpoint of any stage and number of ranks; no process group, on the CPU."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor


def consolidated(folder: Path, tag: str, *, excluded_frozen: bool) -> dict[str, Tensor]:
    """The fp32 weights by name, tied ones under each of their names.

    Args:
        folder: holds the checkpoint's folder.
        tag: the checkpoint's folder.
        excluded_frozen: the checkpoint holds trained weights only.

    Source: DeepSpeed's converter `deepspeed/utils/zero_to_fp32.py` (0.19.6 to 0.20), which is also copied into every
    checkpoint.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        str(folder), tag=tag, exclude_frozen_parameters=excluded_frozen
    )
    return weights
