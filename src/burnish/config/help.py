"""Every key in plain text, for `--help-all`."""

from __future__ import annotations

import json

from burnish.config.names import all_keys


def all_keys_text() -> str:
    """A line for each key with its default, and one that says what it is."""
    lines = [
        "Every key, as a flag; in a file the parts are nested. `burnish schema` gives the JSON schema.",
        "",
    ]
    section = ""
    for key in all_keys():
        head = key.name.partition(".")[0]
        if head != section:
            lines += [] if not section else [""]
            section = head
        default = "required" if key.required else f"default {json.dumps(key.default)}"
        lines += [f"--{key.name}  {key.takes} ({default})", f"      {key.doc}"]
    lines += ["", "data.eval takes sources as data.train does (data.train[] stands for one of them)."]
    return "\n".join(lines)
