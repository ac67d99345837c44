"""The shape of a model and what its step keeps, counted on the meta device."""

import json

import pytest
import torch
from helpers import TINY_LLAMA

from ds_trainer.arguments.schema import AdapterSection, FreezeSection, LoraSection, ModelSection
from ds_trainer.errors import ModelError
from ds_trainer.model import load
from ds_trainer.model.attention import arrange, register_document_attention
from ds_trainer.objectives import language_model
from ds_trainer.plan import shape
from ds_trainer.plan.shape import Traced, read_config, read_shape, trace
from ds_trainer.protocols import MicroBatch

HIDDEN, INNER, HEADS, SEQ = 64, 128, 4, 48


def section(layers: int = 2, **fields: object) -> str:
    config = {
        **TINY_LLAMA,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_key_value_heads": HEADS,
        "tie_word_embeddings": False,
        **fields,
    }
    return ModelSection(config=config, tokenizer="x").model_dump_json()


LORA = AdapterSection(lora=LoraSection(rank=8)).model_dump_json()


def traced(layers: int = 2, **changed: object) -> shape.StepPeak:
    fields = {
        "model": section(layers),
        "adapter": "null",
        "precision": "fp32",
        "attention": "documents",
        "gradient_checkpointing": False,
        "rows": 1,
        "seq_len": SEQ,
        "keep_gradients": False,
        "whole_layers": False,
        "on_cpu": False,
    }
    return trace(Traced(**{**fields, **changed}))


def test_parameters_are_those_of_the_architecture():
    found = read_shape(section(), "null", "bf16")
    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    assert found.total == found.trained == 2 * layer + 2 * 320 * HIDDEN + HIDDEN
    assert found.largest_module == 320 * HIDDEN
    assert [each.decays for each in found.weights if each.name.endswith("norm.weight")] == [False] * 5
    tied = read_shape(section(tie_word_embeddings=True), "null", "bf16")
    assert tied.total == found.total - 320 * HIDDEN


def test_lora_trains_two_matrices_beside_each_linear_layer():
    found = read_shape(section(), LORA, "bf16")
    beside = 8 * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))
    assert found.trained == 2 * beside
    assert found.total == read_shape(section(), "null", "bf16").total + 2 * beside


def test_a_reward_model_has_a_value_head_and_no_vocabulary_to_predict():
    words, values = read_shape(section(), "null", "bf16"), read_shape(section(), "null", "bf16", value_head=True)
    assert values.total == words.total - 320 * HIDDEN + HIDDEN
    freeze = AdapterSection(freeze=FreezeSection(train=["score.*"])).model_dump_json()
    assert read_shape(section(), freeze, "bf16", value_head=True).trained == HIDDEN
    assert traced(2, value_head=True).total < traced(2).total


def test_a_layer_keeps_what_its_backward_pass_needs():
    # Each norm: its input, the normalised input, its output, and one number a position; attention: query, key, value, output,
    # one number a head, and the output in one piece; the MLP: gate, up, silu(gate), their product.
    position = 4 * (2 * (3 * HIDDEN + 1) + 4 * HIDDEN + HEADS + HIDDEN + 4 * INNER)
    assert traced(3).forward - traced(2).forward == position * SEQ


def test_checkpointing_keeps_one_vector_a_position_and_layer():
    kept = traced(3, gradient_checkpointing=True).forward - traced(2, gradient_checkpointing=True).forward
    assert kept == 4 * HIDDEN * SEQ
    assert traced(8, gradient_checkpointing=True).total < traced(8).total / 3


@pytest.mark.parametrize("policy", [False, True, 2, "selective"])
def test_a_real_step_keeps_what_the_trace_says(policy):
    """The same count over real tensors, with a real attention kernel."""
    register_document_attention()
    model = load.build_model(read_config(ModelSection.model_validate_json(section(6))), precision="fp32", attention="documents")
    load.finish_model(model, tokens=0, resize=False, gradient_checkpointing=policy, seed=0)
    language_model.attach(model, chunked=True)
    for each in model.parameters():
        each.register_post_accumulate_grad_hook(shape._drop_gradient)
    positions = torch.arange(4 * SEQ)[None]
    batch = MicroBatch(
        input_ids=positions % 320, labels=positions % 320, position_ids=positions, is_token=torch.ones_like(positions).bool()
    )
    counter = shape._Alive(model, None)
    with counter:
        language_model.nll_sum(model, arrange(batch, "documents")).backward()
    asked = traced(6, gradient_checkpointing=policy, rows=4)
    assert asked.total == pytest.approx(counter.total, rel=0.05)


def test_what_is_kept_grows_with_the_share_that_is_not_computed_again():
    kept = {policy: traced(8, gradient_checkpointing=policy, rows=4).forward for policy in (False, True, 2, 4, "selective")}
    assert kept[True] < kept[2] < kept[4] < kept[False]
    assert kept[True] < kept["selective"] < 0.7 * kept[False]
    half = (kept[True] + kept[False]) / 2
    assert kept[2] == pytest.approx(half, rel=0.02)


def test_many_layers_follow_from_two_short_traces(monkeypatch):
    short = [traced(layers, gradient_checkpointing=each) for layers in (6, 9) for each in (True, False)]
    monkeypatch.setattr(shape, "_stack_of_equal_layers", lambda model: None)
    trace.cache_clear()
    assert [traced(layers, gradient_checkpointing=each) for layers in (6, 9) for each in (True, False)] == short


def test_gradients_that_stay_count_in_the_peak():
    assert traced(4, keep_gradients=True).total >= 4 * read_shape(section(4), "null", "fp32").total


def test_gradients_of_a_layer_that_is_gathered_whole_count_to_the_end_of_its_backward_pass():
    layer = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN)
    small = {"model": section(4, vocab_size=8), "seq_len": 1}  # nothing but the gradients counts
    more = traced(**small, whole_layers=True).total - traced(**small).total
    assert 0.7 * layer < more <= layer


def test_on_the_cpu_the_heap_of_every_layer_is_replayed():
    shallow, deep = (traced(layers, on_cpu=True, gradient_checkpointing=True) for layers in (4, 8))
    assert (shallow.total, deep.total) == tuple(traced(layers, gradient_checkpointing=True).total for layers in (4, 8))
    # All blocks are small here, and no block finds its place in a hole of just its size.
    assert (shallow.large, deep.large) == (0, 0)
    assert shallow.small > 1.3 * shallow.total
    assert deep.small - shallow.small > 2 * (deep.total - shallow.total)
    assert traced(4).small == 0


def test_bf16_keeps_less():
    assert traced(precision="bf16").forward < traced().forward


def test_eager_attention_keeps_the_scores_and_no_other_does():
    def bend(attention: str) -> float:
        """What a row of twice the length takes beyond twice as much."""
        long, short = (traced(attention=attention, seq_len=each).forward for each in (2 * SEQ, SEQ))
        return long - 2 * short

    scores = 2 * HEADS * 4 * ((2 * SEQ) ** 2 - 2 * SEQ**2)  # of two layers, in fp32, once
    assert bend("eager") - bend("documents") == scores
    assert bend("sdpa") == bend("documents")


def test_without_the_chunked_loss_the_logits_are_there():
    fields = json.loads(section(vocab_size=32768))["config"]
    whole, chunked = (
        traced(model=ModelSection(config=fields, tokenizer="x", chunked_loss=each).model_dump_json(), seq_len=8192).total
        for each in (False, True)
    )
    assert whole - chunked > 4096 * 32768 * 4  # chunks are of 4096 targets here


def test_a_model_of_the_hub_is_asked_for_its_config():
    with pytest.raises(ModelError) as caught:
        read_config(ModelSection(path="meta-llama/Llama-3.1-8B"))
    assert "hf download meta-llama/Llama-3.1-8B config.json" in str(caught.value)
    assert "model.path=that/folder" in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mixtral", "num_local_experts": 4},
        {"model_type": "gemma3_text", "head_dim": 16},
        {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2},
        {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4},
    ],
)
def test_other_architectures_are_traced_by_their_own_code(fields):
    found = traced(model=section(**fields), precision="bf16")
    assert found.total >= found.forward > 2 * SEQ * HIDDEN * 10


def test_a_model_that_cannot_be_traced_is_refused_in_words():
    with pytest.raises(ModelError, match="cannot be traced without its weights"):
        traced(model=section(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=8, moe_intermediate_size=32))


@pytest.mark.parametrize(("precision", "to_an_element"), [("fp32", 8), ("bf16", 4)])
def test_weights_in_4_bits_are_counted_as_parameters_and_as_what_they_take(precision, to_an_element):
    quantized = json.dumps({**json.loads(section()), "quantize": "nf4"})
    plain, found = read_shape(section(), LORA, precision), read_shape(quantized, LORA, precision)
    linear = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
    assert found.packed == linear
    assert (found.total, found.trained, found.flops) == (plain.total, plain.trained, plain.flops)
    assert found.held == plain.held - linear + linear // to_an_element
    scales = linear / 64 + 4 * linear / (64 * 256)
    assert found.buffers_bytes == pytest.approx(plain.buffers_bytes + scales, abs=1)


def test_a_weight_in_4_bits_is_whole_only_while_it_is_multiplied():
    wide = section(vocab_size=8, intermediate_size=4096)  # so that it is one of them at which the most is held
    quantized = json.dumps({**json.loads(wide), "quantize": "nf4"})
    plain, found = traced(adapter=LORA, model=wide), traced(adapter=LORA, model=quantized)
    assert found.forward == plain.forward
    assert 0 < found.total - plain.total <= 4 * 4096 * HIDDEN
