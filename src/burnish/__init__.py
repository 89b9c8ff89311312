"""Burnish: supervised fine-tuning of large language models that can be trusted."""

__version__ = "0.1.0"
