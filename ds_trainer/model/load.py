"""Build the model: from scratch with reproducible weights, or from pretrained ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_trainer.arguments.constraints import DTYPES
from ds_trainer.arguments.schema import ModelSection, Recompute
from ds_trainer.errors import ModelError
from ds_trainer.model import quantize
from ds_trainer.model.stack import recompute_activations
from ds_trainer.model.tokenizer import first_line, require_folder

VALUE_HEAD = "score.weight"
"""What a model with a value head has beside the body of a language model."""
Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Makes the given parameters whole on every rank inside the context, and takes rank zero's values at its end."""


def load_config(model: ModelSection) -> Any:
    """Read the transformers config of the model.

    Raises:
        ModelError: there is none, or transformers does not know its `model_type`.
    """
    from transformers import AutoConfig

    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        if isinstance(model.config, dict):
            fields = dict(model.config)
            kind = fields.pop("model_type", None)
            if kind is None:
                raise ModelError("model.config has no model_type; write for example `model_type: llama`.")
            return AutoConfig.for_model(kind, **fields)
        path = model.config or model.path
        assert path is not None  # a constraint of the settings
        require_folder(path, "model.config" if model.config else "model.path")
        config = AutoConfig.from_pretrained(path, **options)
        if quantized := getattr(config, "quantization_config", None):
            method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
            raise ModelError(
                f"model.path = {path}: its weights are quantized ({method or 'by its quantization_config'}), so that what they "
                "were is lost. Give the model they were made from; for QLoRA with model.quantize: nf4."
            )
        return config
    except ModelError:
        raise
    except Exception as error:
        name = "model.config" if model.config else f"model.path = {model.path}"
        raise ModelError(
            f"{name}: no model config could be read ({_bad_json(model) or first_line(error)}). "
            "A model folder holds config.json with a model_type that this transformers version knows."
        ) from None


def _bad_json(model: ModelSection) -> str | None:
    """Where the config.json of a local folder stops being JSON; None when that is not what is wrong."""
    path = Path(str(model.config or model.path)) / "config.json"
    if not isinstance(model.config, dict) and path.is_file():
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"{path}: not valid JSON: {error}"
    return None


def check_fit(config: Any, *, seq_len: int, tokens: int, max_token_id: int, resize: bool) -> None:
    """Refuse a model whose positions or vocabulary are too small for the data.

    Args:
        config: the model's transformers config.
        seq_len: positions in a row.
        tokens: size of the tokenizer's vocabulary, added tokens included.
        max_token_id: the highest id in the data.
        resize: whether the embeddings may grow.

    Raises:
        ModelError: what does not fit, and both numbers.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and seq_len > positions:
        raise ModelError(
            f"data.seq_len = {seq_len} is above the model's max_position_embeddings = {positions}. "
            f"Set data.seq_len to {positions} or less."
        )
    if max_token_id >= text.vocab_size and not resize:
        raise ModelError(
            f"the data holds token id {max_token_id}, and the model's vocabulary ends at {text.vocab_size - 1} "
            f"(the tokenizer knows {tokens} tokens). Set model.resize_vocabulary: true if the tokenizer was extended on "
            "purpose; otherwise model.tokenizer does not belong to this model."
        )


def auto_class(*, value_head: bool) -> Any:
    """Transformers' name for the kind of model: a language model, or one with a head that gives one value."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if value_head else AutoModelForCausalLM


def build_model(
    config: Any, *, precision: str, attention: str, trust_remote_code: bool = False, value_head: bool = False
) -> nn.Module:
    """Construct the model with the weights transformers gives it; inside a sharding context they are sharded at once.

    Raises:
        ModelError: transformers has no model of this kind for this config.
    """
    if value_head:
        config.num_labels = 1
    try:
        model: nn.Module = auto_class(value_head=value_head).from_config(
            config,
            dtype=getattr(torch, DTYPES[precision]),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
        return model
    except (ValueError, ImportError) as error:
        kind = " with a value head" if value_head else ""
        raise ModelError(f"a {config.model_type} model{kind} cannot be built with attention `{attention}`: {error}") from None


def mark_padding(model: Any, pad_token_id: int | None) -> None:
    """Tell a model with a value head what padding is: it reads the value at the last token before that.

    After the model is built, for an embedding does not learn the token that it was built to take for padding.
    """
    for each in (model.config, model.config.get_text_config()):
        each.pad_token_id = pad_token_id


def initialize_value_head(model: nn.Module, seed: int, gather: Gather | None = None) -> None:
    """Give the value head on a pretrained body its first weights. Collective under ZeRO-3: every rank."""
    initialize_weights(model, seed, gather, only=VALUE_HEAD.partition(".")[0])


def initialize_weights(model: nn.Module, seed: int, gather: Gather | None = None, only: str = "") -> None:
    """Give every module the initial weights that belong to the seed and the module's name.

    transformers draws all weights from one stream in an order that differs between ZeRO-3 and the other stages, so that the
    same seed starts two different models. Here each module has its own stream: the same seed gives the same weights at
    every stage and number of ranks (on one kind of device). Collective under ZeRO-3: every rank.

    Args:
        model: a transformers model.
        seed: `train.seed`.
        gather: makes sharded parameters whole; None when they are whole.
        only: the name of a child; the others keep their weights.
    """
    from transformers import PreTrainedModel

    def visit(module: nn.Module, name: str, owner: PreTrainedModel) -> None:
        for child_name, child in module.named_children():
            if only and not name and child_name != only:
                continue
            visit(child, f"{name}.{child_name}", child if isinstance(child, PreTrainedModel) else owner)
        # `_init_weights` of some models also touches the parameters of direct children.
        if only and not name:
            return
        parameters = [*module.parameters(recurse=False)]
        parameters += [each for child in module.children() for each in child.parameters(recurse=False)]
        if not parameters:
            return
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        with gather(parameters) if gather else nullcontext():
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            # Sharded and not gathered here, a parameter is empty; only rank zero's values count, but all draw alike.
            owner._init_weights(module)

    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        visit(model, "", model)
    model.tie_weights()


def load_pretrained(
    model: ModelSection, config: Any, *, precision: str, attention: str, new_head: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Load pretrained weights through transformers.

    Under ZeRO-3 rank zero then reads the whole file: `engine.sharded_weights` does better where it can.

    Args:
        model: where they are, and whether they are held in 4 bits: then whole on every rank, at any stage.
        config: the model's transformers config.
        precision: `fp32`, `bf16` or `fp16`.
        attention: the attention implementation.
        new_head: gives a value head its first weights, where the file has none; None loads a language model.

    Raises:
        ModelError: no weights there, or weights are missing in the file and would be random.
    """
    if new_head is not None:
        config.num_labels = 1
    try:
        loaded, info = auto_class(value_head=new_head is not None).from_pretrained(
            model.path,
            config=config,
            dtype=getattr(torch, DTYPES[precision]),
            attn_implementation=attention,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
            **({"quantization_config": quantize.how_to_hold(precision)} if model.quantize else {}),
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"model.path = {model.path}: the model cannot be loaded ({first_line(error)}).") from None
    missing = set(info["missing_keys"])
    if new_head is not None and missing == {VALUE_HEAD}:
        missing.clear()
        new_head(loaded)
    refuse_missing(model.path, missing)
    if model.quantize:
        quantize.multiply_here(loaded)
    return loaded  # type: ignore[no-any-return]


def refuse_missing(path: str | None, missing: Iterable[str]) -> None:
    """Refuse weights that the model has and the file does not.

    Raises:
        ModelError: with the first few names.
    """
    names = sorted(missing)
    if names:
        raise ModelError(
            f"model.path = {path}: {len(names)} weights of the model are not in the file and would be random, "
            f"for example {', '.join(names[:3])}. Is this a base model of the same architecture?"
        )


def weight_files(path: str) -> list[Path]:
    """The safetensors files of a local model folder; empty when it has none, or is a hub id."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return sorted(folder / name for name in names)
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


def has_converted_weights(section: ModelSection) -> bool:
    """Whether transformers keeps this model's weights otherwise in memory than in its files, as for mixtures of experts."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(get_checkpoint_conversion_mapping(load_config(section).model_type))


def finish_model(
    model: Any, *, tokens: int, resize: bool, gradient_checkpointing: Recompute, seed: int, offload_activations: bool = False
) -> None:
    """Grow the vocabulary and switch checkpointing on, where asked. Collective under ZeRO-3: every rank.

    Args:
        model: a transformers model.
        tokens: size of the tokenizer's vocabulary.
        resize: grow the embeddings to it if they are smaller.
        gradient_checkpointing: which activations the backward pass computes again.
        seed: `train.seed`; new rows are drawn from it.
        offload_activations: keep the inputs of layers that are computed again in host memory.

    Raises:
        ModelError: `recompute_activations` cannot do what was asked with this model.
    """
    if resize and tokens > model.config.get_text_config().vocab_size:
        torch.manual_seed(seed)
        model.resize_token_embeddings(tokens, mean_resizing=False)
    if gradient_checkpointing:
        recompute_activations(model, gradient_checkpointing, offload=offload_activations)
    model.config.use_cache = False
    model.train()
