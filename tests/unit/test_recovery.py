"""What a checkpoint and the run that goes on from it must have in common, and what they need not."""

from __future__ import annotations

import pytest
from helpers import TINY_LLAMA
from transformers import AutoConfig

from ds_trainer.arguments.schema import AdapterSection
from ds_trainer.model.layers import meta_model
from ds_trainer.recovery import as_now, config_digest


def config(**fields):
    return AutoConfig.for_model(**{**TINY_LLAMA, **fields})


def test_the_fingerprint_of_a_config_is_of_the_model_and_not_of_how_it_was_built():
    """ZeRO-3 builds it once more without weights; some ways of loading set use_cache in it, some in a copy."""
    ours = config()
    expected = config_digest(ours)
    settings = {"precision": "bf16", "attention": "eager", "trust_remote_code": False, "gradient_checkpointing": True}
    meta_model(ours, **settings, adapter=AdapterSection.model_validate({"lora": {}}))
    assert config_digest(ours) == expected == config_digest(config(use_cache=False))
    assert config_digest(config(rope_theta=1.0)) != expected
    padded = [config_digest(config(pad_token_id=each), value_head=True) for each in (None, 3)]
    assert padded[0] == padded[1], "a value head is told what padding is"


@pytest.mark.parametrize("written", [None, {"lora": {"rank": 4}}, {"freeze": {"last_layers": 1}}], ids=str)
def test_settings_that_a_checkpoint_does_not_know_were_not_used(written):
    then = {"adapter": written, "seed": 3}
    now = as_now(then)
    assert now["adapter"] == (AdapterSection.model_validate(written).model_dump(mode="json") if written else None)
    assert now["seed"] == 3
    assert now["no_weight_decay"] == []
    assert now["neftune_alpha"] is None
    assert as_now({"adapter": None, "neftune_alpha": 5.0})["neftune_alpha"] == 5.0
