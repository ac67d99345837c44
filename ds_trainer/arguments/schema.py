"""The run file: one class a section, one documented field a setting.

The classes only hold values. They open no file, look at no device and start nothing; whatever needs more than one
setting to decide stands in `constraints.py`, and batch arithmetic in `batch.py`. Types are strict: `"8"` is not 8, `1.5` is no
batch size and `true` is no number, because a value that has to be guessed at is a value somebody got wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
NonEmptyText = Annotated[str, Field(min_length=1)]

TargetModules = Literal["all-linear"] | Annotated[list[NonEmptyText], Field(min_length=1)]
"""Names (or ends of names) of linear layers; `all-linear` takes all but the head."""
Recompute = bool | Annotated[int, Field(ge=2)] | Literal["selective"]
"""Which activations the backward pass computes again: none, those of every layer, of every n-th layer, the cheap ones."""


class Section(BaseModel):
    """Base of all sections: frozen, strict, no unknown keys; docstrings below fields become the JSON schema's descriptions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class ModelSection(Section):
    """Which model is trained, and how it is held in memory."""

    path: NonEmptyText | None = None
    """Folder or hub id of a pretrained model. Give this or `config`, not both."""
    config: NonEmptyText | dict[str, Any] | None = None
    """From scratch: the fields of a transformers config (with `model_type`), or the path of a `config.json` or its folder."""
    tokenizer: NonEmptyText | None = None
    """Folder or hub id of the tokenizer; by default that of `path`."""
    revision: NonEmptyText | None = None
    """Branch, tag or commit of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you have read that code."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """The type the weights are held in while training; another word for `train.precision`, and must agree with it."""
    attention: NonEmptyText = "auto"
    """Attention implementation: `auto`, `documents` (ours, one call a document), `sdpa`, `eager`, `flash_attention_2`, ..."""
    gradient_checkpointing: Recompute = False
    """Recompute activations in the backward pass. `true`: of every layer, a third more compute for much less memory; a number
    n: of every n-th layer; `selective`: keep results of linear layers and attention, recompute the rest: next to no compute."""
    offload_activations: bool = False
    """Keep the inputs of recomputed layers in host memory, for rows that are very long. Needs `gradient_checkpointing`."""
    quantize: Literal["nf4"] | None = None
    """QLoRA: hold the base's linear layers in 4 bits, under an adapter that is trained. Needs bitsandbytes."""
    resize_vocabulary: bool = False
    """Grow the embeddings when the tokenizer has more tokens than the model; otherwise that is an error."""
    chunked_loss: bool = True
    """Compute head and loss in chunks of targets, so that the logits are never whole in memory. The result is the same."""


class LoraSection(Section):
    """Low-rank adaptation: the base stays frozen, small matrices beside chosen linear layers are trained."""

    path: NonEmptyText | None = None
    """Folder of an adapter to go on from; its own config then says rank, alpha, targets and variant."""
    rank: PositiveInt = 16
    """Inner dimension of the added matrices."""
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    """The added product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the added matrices."""
    target_modules: TargetModules = "all-linear"
    """Names (or ends of names) of the linear layers that get an adapter; `all-linear` takes all but the head."""
    init: Literal["zero", "pissa", "olora"] = "zero"
    """`zero`: the second matrix begins at zero. `pissa`, `olora`: both begin with the main part of the weight, which is taken
    out of the base."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, so that a higher rank does not learn more slowly."""
    dora: bool = False
    """Train the length of each weight's columns apart from their direction: more like full fine-tuning, and slower."""
    learning_rate_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    """LoRA+: the learning rate of the second matrix (B) is that of the first times this; its authors use 16."""
    modules_to_save: list[NonEmptyText] = []
    """Names (or ends of names) of modules that are trained whole beside the adapter, such as `embed_tokens` and `lm_head`."""


class Ia3Section(Section):
    """(IA)3: a vector beside each chosen linear layer scales its output, or in feed-forward layers its input."""

    target_modules: Annotated[list[NonEmptyText], Field(min_length=1)] = ["k_proj", "v_proj", "down_proj"]
    """Names (or ends of names) of the linear layers that get a vector."""
    feedforward_modules: list[NonEmptyText] = ["down_proj"]
    """Those of them whose input is scaled."""


class VeraSection(Section):
    """VeRA: two random matrices that all layers share stay as they are, and two vectors a layer are trained."""

    rank: PositiveInt = 256
    """Inner dimension of the random matrices; larger than LoRA's."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the input of the matrices."""
    target_modules: TargetModules = "all-linear"
    """Names (or ends of names) of the linear layers that get vectors; `all-linear` takes all but the head."""


class OftSection(Section):
    """OFT: the input of each chosen linear layer is rotated, block by block."""

    block_size: Annotated[int, Field(ge=2)] = 32
    """Features that are rotated together; divides the number of inputs of every chosen layer."""
    target_modules: TargetModules = "all-linear"
    """Names (or ends of names) of the linear layers whose input is rotated; `all-linear` takes all but the head."""


class FreezeSection(Section):
    """Some of the model's own weights are trained, the others stay as they are."""

    last_layers: PositiveInt | None = None
    """The last so many decoder layers are trained."""
    train: list[NonEmptyText] = []
    """Weights that are trained (too), as patterns over their names, such as `*.mlp.*` or `lm_head.*`."""


class AdapterSection(Section):
    """What is trained instead of all weights: give one of these. Without this section all weights are trained."""

    lora: LoraSection | None = None
    """Low-rank adaptation."""
    ia3: Ia3Section | None = None
    """Vectors that scale."""
    vera: VeraSection | None = None
    """Vectors beside shared random matrices."""
    oft: OftSection | None = None
    """Rotations."""
    freeze: FreezeSection | None = None
    """A part of the weights."""

    @property
    def beside(self) -> LoraSection | Ia3Section | VeraSection | OftSection | None:
        """What puts new weights beside a frozen base; None where weights of the model itself are trained."""
        return self.lora or self.ia3 or self.vera or self.oft


class Source(Section):
    """Records of one format: files, a folder of `datasets`, or a data set of the hub."""

    path: NonEmptyText
    """A file, a glob such as `corpus/*.jsonl.zst`, a folder that `datasets` saved, or a hub id such as `owner/name`."""
    format: Literal["auto", "text", "messages", "sharegpt", "prompt_response", "alpaca", "preference", "kto", "tokens"] = "auto"
    """How to read a record. `auto` decides by the keys of the first record, says so, and holds the others to it."""
    fields: dict[NonEmptyText, NonEmptyText] = {}
    """The format's key -> the key (or column) that holds it here, as in `{text: content}`."""
    split: NonEmptyText | None = None
    """Which split of a folder of `datasets` or of a hub id."""
    subset: NonEmptyText | None = None
    """Which subset (configuration) of a hub id."""
    weight: Annotated[float, Field(gt=0.0)] | None = None
    """Share of the rows that come from this source, relative to the other weights. All sources have one, or none has."""
    max_samples: PositiveInt | None = None
    """Only the first so many records."""


class DataSection(Section):
    """What the model is trained on and how it becomes rows of tokens."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """The training data, all sources together."""
    seq_len: PositiveInt
    """Positions in a row, padding included."""
    packing: bool = True
    """Put several samples in one row; they never see one another. Without it a row holds one sample and padding."""
    overlong: Literal["truncate", "split", "drop"] | None = None
    """A sample longer than seq_len: by default `split` for pretrain, `truncate` for sft, `drop` for pairs. Always counted."""
    chat_template: NonEmptyText | None = None
    """Replaces the tokenizer's chat template: a built-in one (`plain`, `chatml`, `llama3`) or a Jinja file."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """What of a conversation is trained: the assistant's turns, the last of them, or the prompt too."""
    on_bad_record: Literal["error", "skip"] = "error"
    """`skip` leaves bad records out, counts and lists them, up to `max_bad_fraction`."""
    max_bad_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.001
    """With `skip`: the run is refused when more of a source's records than this are bad."""
    max_untrained_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    """The run is refused when more of the samples than this have no token left to train on, as after truncation."""
    cache_folder: NonEmptyText | None = None
    """Where tokenised data is kept; by default `data_cache` beside the run folder."""
    streaming: bool = False
    """Tokenise while training, for a corpus that nobody wants to tokenise first. Needs `train.max_steps`."""
    streaming_buffer: PositiveInt = 2
    """Chunks of about 1 MiB (or 1,000 rows of a table) that are shuffled and packed together when streaming."""
    workers: NonNegativeInt = 1
    """Background workers of each rank: threads that read rows, or processes that tokenise when streaming. 0: none."""
    timeout_seconds: PositiveInt = 300
    """A window of data that takes longer than this to arrive ends the run with the worker's name instead of hanging."""


class TrainSection(Section):
    """What one run does: how long, how large the steps, how the weights move."""

    stage: Literal["pretrain", "sft", "reward", "dpo", "orpo", "simpo", "kto"]
    """`pretrain` trains on every token, `sft` on the assistant's; `dpo`, `orpo`, `simpo` and `reward` on pairs of answers,
    `kto` on answers with a label."""
    max_steps: PositiveInt | None = None
    """Optimizer steps in all. Give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
    """Passes over the data; 1 when neither this nor `max_steps` is given."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step over all ranks."""
    micro_batch_size: PositiveInt | None = None
    """Rows per rank per forward."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Forwards per rank per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """The highest learning rate of the schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up, in optimizer steps."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises; the first one already moves the weights."""
    min_learning_rate: NonNegativeFloat = 0.0
    """Where `linear` and `cosine` end."""
    weight_decay: NonNegativeFloat = 0.01
    """Decay of matrices; norms and biases never decay."""
    no_weight_decay: list[NonEmptyText] = []
    """Weights that do not decay either, as patterns over their names, such as `*embed_tokens*`."""
    layer_learning_rate_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer learns at the rate of the one above it times this, the embeddings last; 1 is one rate for all."""
    betas: Annotated[list[Annotated[float, Field(ge=0.0, lt=1.0)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's two decay rates."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    neftune_alpha: Annotated[float, Field(gt=0.0)] | None = None
    """NEFTune: noise on the embeddings while training, of this scale; its authors use 5 to 15."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of weights and activations in forward and backward; the optimizer keeps fp32 master weights."""
    seed: NonNegativeInt = 0
    """Decides initial weights, the order of the data and dropout."""
    deterministic: bool = False
    """The same bits again from the same start on a GPU too, with slower kernels; without it their last bits vary there."""
    max_seconds: PositiveInt | None = None
    """Stop after so much wall-clock time as a signal would: at a step's end, with a checkpoint, to be started again."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What follows gradients that are not finite: leave the weights alone and go on, or end the run."""
    max_skipped_steps: NonNegativeInt = 20
    """Steps in a row that `skip` lets pass; one more ends the run."""
    hang_timeout_seconds: PositiveInt = 600
    """A rank without progress for so long says where it is and ends the run. Longer than any micro-step or save."""
    collective_timeout_seconds: PositiveInt = 900
    """The same before the first step, and for any collective. Longer than `hang_timeout_seconds`, which can say more."""


class ObjectiveSection(Section):
    """The numbers of the objective. Each stage takes its own, and refuses the others."""

    router_weight: Annotated[float, Field(gt=0.0)] | None = None
    """pretrain and sft, mixtures of experts: weight of a loss that keeps experts in use; without it there is none."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo"] | None = None
    """dpo: what is made of the difference between the two answers; `sigmoid` by default."""
    beta: Annotated[float, Field(gt=0.0)] | None = None
    """dpo and kto: how much the policy is held to the reference, 0.1 by default. simpo: scale of the rewards, 2.0 by
    default."""
    reference: Literal["held", "precomputed"] | None = None
    """dpo and kto: `held` computes with the model before the run in each step, `precomputed` once before the first and keeps
    what it found beside the tokens; `held` by default."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] | None = None
    """dpo with `sigmoid` or `robust`: the share of the preferences that is expected to be wrong; 0 by default."""
    gamma: NonNegativeFloat | None = None
    """simpo: the margin that is aimed at, in rewards; 1.0 by default."""
    desirable_weight: NonNegativeFloat | None = None
    """kto: weight of the answers that are wanted; 1.0 by default."""
    undesirable_weight: NonNegativeFloat | None = None
    """kto: weight of the others; 1.0 by default."""
    odds_weight: Annotated[float, Field(gt=0.0)] | None = None
    """orpo: weight of the odds ratio beside the imitation of the chosen answer; 0.1 by default."""


class GenerateSection(Section):
    """Prompts that the model completes at every evaluation, for people to read."""

    prompts: NonEmptyText
    """A file of lines `{"prompt": ...}`, each a text or a list of messages."""
    max_prompts: PositiveInt = 8
    """The first so many are taken."""
    max_new_tokens: PositiveInt = 64
    """A completion ends after so many tokens, or with the end-of-text token."""
    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token; above, tokens are drawn, from (seed, step, prompt)."""


class EvaluateSection(Section):
    """Loss on rows that are never trained on. Without this section nothing is evaluated."""

    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """The held-out data. Give this or `sets`."""
    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], Annotated[list[Source], Field(min_length=1)]] = {}
    """Several held-out sets, each with a name of its own: measured one by one."""
    every_steps: PositiveInt | None = None
    """Evaluate after every so many optimizer steps; always at the end."""
    max_rows: PositiveInt = 512
    """Rows of each set that are evaluated at most."""
    metric: NonEmptyText = "loss"
    """What the best checkpoint and `patience` go by: `loss` or another number of the evaluation such as `rewards/accuracies`;
    with `sets` the name of one in front, as in `code/loss`."""
    goal: Literal["lowest", "highest"] | None = None
    """Which value of `metric` is best; known for `loss`, `rewards/accuracies` and `rewards/margins`."""
    patience: PositiveInt | None = None
    """End the run after so many evaluations in a row without a better `metric`."""
    min_improvement: NonNegativeFloat = 0.0
    """A value is better for `patience` when it is better by more than this."""

    generate: GenerateSection | None = None
    """Completions to read."""

    @property
    def held_out(self) -> dict[str, list[Source]]:
        """The sources of each set by name; the one of `sources` has the name ""."""
        return {"": self.sources} if self.sources is not None else dict(self.sets)


class DeepSpeedSection(BaseModel):
    """The engine. Any DeepSpeed key may stand here, on top of the JSON; `deepspeed_keys.py` validates them."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, use_attribute_docstrings=True)

    config: NonEmptyText | None = None
    """Path of a DeepSpeed JSON; `--deepspeed` replaces it."""


class CheckpointSection(Section):
    """Where the run is kept and when it is saved."""

    folder: NonEmptyText
    """The run folder."""
    every_steps: PositiveInt | None = None
    """Save after every so many optimizer steps; always at the end."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that are kept; what no other setting keeps is removed after a new one is complete."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints of these steps are kept for good."""
    keep_best: NonNegativeInt = 0
    """So many of the best checkpoints by `evaluate.metric` are kept too; needs `evaluate`."""
    max_gib: Annotated[float, Field(gt=0.0)] | None = None
    """What all checkpoints may take on the disk, in GiB: older ones go first, the newest one never."""
    background: bool = True
    """Write while training goes on, from a copy of the state in host memory; `false` waits for the disk instead."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What follows a checkpoint that could not be written: end the run, or train on and try again when the next is due."""
    resume: NonEmptyText = "auto"
    """`auto` continues from the newest complete checkpoint if there is one; `never` starts anew; or a checkpoint's path."""


class MonitorSection(Section):
    """What is written about the run while it goes on. `metrics.jsonl` is always written."""

    log_every_steps: PositiveInt = 10
    """Optimizer steps between two lines of metrics."""
    peak_tflops: Annotated[float, Field(gt=0.0)] | None = None
    """10^12 operations a second of one device at most, in `train.precision`: what MFU is a share of. Known for common GPUs."""
    tensorboard: dict[str, Any] | None = None
    """DeepSpeed's `tensorboard` block."""
    wandb: dict[str, Any] | None = None
    """DeepSpeed's `wandb` block."""
    csv_monitor: dict[str, Any] | None = None
    """DeepSpeed's `csv_monitor` block."""
    comet: dict[str, Any] | None = None
    """DeepSpeed's `comet` block."""


class RunSettings(Section):
    """A whole run, as the run file writes it."""

    model: ModelSection
    """Which model is trained."""
    adapter: AdapterSection | None = None
    """What is trained instead of all weights."""
    data: DataSection
    """What it is trained on."""
    train: TrainSection
    """How it is trained."""
    objective: ObjectiveSection | None = None
    """The numbers of what is minimised; for the stages that train on pairs."""
    evaluate: EvaluateSection | None = None
    """What it is measured on."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    """The engine's own settings."""
    checkpoint: CheckpointSection
    """Where it is kept."""
    monitor: MonitorSection = MonitorSection()
    """What is written about it."""

    @property
    def probe_sources(self) -> list[Source]:
        """The data whose loss is kept with every checkpoint."""
        return next(iter(self.evaluate.held_out.values())) if self.evaluate else self.data.sources

    @property
    def lora(self) -> LoraSection | None:
        """The section `adapter.lora`, where that is what is trained."""
        return self.adapter.lora if self.adapter else None
