"""The program with a model that one token spoils: spoiled.py value|slope TOKEN train|debug ...

Where that token is fed, the second layer's MLP gives NaN (value), or a finite output with an infinite slope (slope).
"""

import sys

import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from ds_trainer.cli import main

kind, token = sys.argv.pop(1), int(sys.argv.pop(1))
embed, mlp = torch.nn.Embedding.forward, LlamaMLP.forward
fed, calls = [], []


def embedding_forward(self, ids):
    fed[:] = [ids]
    calls.clear()
    return embed(self, ids)


def mlp_forward(self, states):
    calls.append(self)
    output = mlp(self, states)
    spoiled = (fed[0] == token)[..., None]
    if len(calls) != 2 or not spoiled.any():
        return output
    if kind == "value":
        return output.masked_fill(spoiled, float("nan"))
    return output + torch.where(spoiled, output - output, 1).sqrt() - torch.where(spoiled, 0.0, 1.0)


torch.nn.Embedding.forward, LlamaMLP.forward = embedding_forward, mlp_forward
sys.exit(main())
