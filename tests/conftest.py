"""Fixtures and switches for every test: no network, shapes checked, few threads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shapes and types of every public record and function are checked while tests run.
install_import_hook("burnish", "beartype.beartype")
