"""What the model in training writes: prompts completed by all ranks together, between two steps."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from ds_trainer import comm, whereabouts
from ds_trainer.arguments.schema import GenerateSection
from ds_trainer.assemble import Prepared
from ds_trainer.engine.wrapper import Engine


def complete_prompts(prepared: Prepared, engine: Engine, wanted: GenerateSection, step: int) -> list[dict[str, Any]]:
    """Complete the prompts of the run. Collective.

    Each prompt is one rank's, alone and without padding, so that it is computed as if nothing else was. Under ZeRO-3 all ranks
    gather weights together: who has nothing left to write goes on calling the model until the last one is done.

    Args:
        prepared: what is decided of the run.
        engine: between two steps.
        wanted: `evaluate.generate`.
        step: optimizer steps that are complete.

    Returns:
        Of each prompt, in their order: `line`, `prompt`, `completion`, `tokens`, and whether it `ended` by itself.
    """
    whereabouts.at("generating")
    tokenizer, prompts = prepared.data.tokenizer, prepared.data.prompts
    ends = ends_of(tokenizer, engine.model)
    engine.train_mode(False)
    own: list[tuple[int, list[int]]] = []
    with torch.no_grad():
        for first in range(0, len(prompts), comm.world_size()):
            number = first + comm.rank()
            ids = prompts[number].ids if number < len(prompts) else ()
            written = complete(engine, ids, wanted, ends, seed_of(prepared.plan.seed, step, number))
            if number < len(prompts):
                own.append((number, written))
    engine.train_mode(True)
    found = dict(sorted(each for ranks in comm.gather_objects(own) for each in ranks))
    return [
        {
            "line": prompts[number].line,
            "prompt": prompts[number].text,
            "completion": tokenizer.decode(ids, skip_special_tokens=True),
            "tokens": len(ids),
            "ended": bool(ids) and ids[-1] in ends,
        }
        for number, ids in found.items()
    ]


def complete(engine: Engine, ids: Sequence[int], wanted: GenerateSection, ends: frozenset[int], seed: int) -> list[int]:
    """Go on from a prompt, token by token, with the keys and values of earlier ones kept. Collective, once a token.

    Args:
        engine: in evaluation mode.
        ids: of the prompt; none on a rank that only takes part.
        wanted: how long, and how tokens are chosen.
        ends: tokens that end a completion.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    written: list[int] = []
    cache, fed = None, list(ids)
    for _ in range(wanted.max_new_tokens):
        goes_on = bool(ids) and (not written or written[-1] not in ends)
        if not comm.largest(int(goes_on)):
            break
        tokens = torch.tensor([fed if goes_on else [0]], device=engine.device)
        output = engine.forward(input_ids=tokens, past_key_values=cache if goes_on else None, use_cache=goes_on)
        if goes_on:
            cache = output.past_key_values
            fed = [choose(output.logits[0, -1].float().cpu(), wanted.temperature, generator)]
            written += fed
    return written


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """The next token: the likeliest, or one that is drawn. logits: (vocabulary,), fp32, on the CPU."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def ends_of(tokenizer: Any, model: Any) -> frozenset[int]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return frozenset(each for each in (tokenizer.eos_token_id, *named) if each is not None)


def seed_of(seed: int, step: int, number: int) -> int:
    """The seed of what is drawn for one prompt: the same whichever rank it is given to."""
    return int.from_bytes(hashlib.sha256(f"generate:{seed}:{step}:{number}".encode()).digest()[:8], "little") >> 1
