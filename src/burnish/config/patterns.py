"""How a config names parts of a model: `model.freeze` and `optim.group_lr`. Pure text."""

from __future__ import annotations

import fnmatch


def names_part(pattern: str, name: str) -> bool:
    """Whether `pattern` names the parameter called `name`, or a module that holds it.

    A pattern stands for whole parts of the dotted name, anywhere in it, with the wildcards of a
    shell:

        embed_tokens    model.[embed_tokens].weight
        layers.[0-3]    model.[layers.2].mlp.up_proj.weight, but no layer 12
        lora_B          base_model.model.model.layers.0.mlp.up_proj.[lora_B].default.weight
        *norm           model.layers.0.[input_layernorm].weight, model.[norm].weight
    """
    return fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")
