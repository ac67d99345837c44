"""Train and fine-tune language models with DeepSpeed, without guesswork."""

__version__ = "0.1.0"
