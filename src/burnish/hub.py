"""The hub, where it cannot be reached: answered at once, from what was downloaded before."""

from __future__ import annotations

import functools
import socket
import textwrap
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from burnish.errors import Problem

_ANSWER_SECONDS = 5.0
"""How long the hub may take to accept a connection; a firewall that drops packets would never say no."""
_MAX_MESSAGE_CHARS = 400


def only_cached(path: str) -> bool:
    """Whether a model or tokenizer can only come from the cache: `local_files_only` of transformers.

    Without it huggingface_hub tries to reach the hub six times for every file that it looks for, with a
    warning each time: a minute for a folder whose name was mistyped.

    Args:
        path: A folder, which needs no hub, or a name on the hub.
    """
    return not Path(path).expanduser().exists() and not _hub_answers()


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub accepts a connection; asked once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    place = urlsplit(constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    if proxies.get(place.scheme) or proxies.get("all"):
        return True  # not ours to try: behind a proxy a host need not even know the hub's address
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), _ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def not_loaded(where: str, path: str, thing: str, error: Exception, cure: str) -> Problem:
    """What to say where transformers could not load something.

    Args:
        where: The key that named it.
        path: What it named: a folder, or a hub name.
        thing: What was to be loaded: a model, a tokenizer.
        error: What transformers said; its lines become one.
        cure: What to give instead.
    """
    if isinstance(error, OSError) and only_cached(path):
        what = (
            f"there is no folder {path}, no {thing} of that name in the cache, and the hub cannot be reached"
        )
        return Problem(where, what, f"Check the path and the network. {cure}")
    said = textwrap.shorten(str(error), _MAX_MESSAGE_CHARS, placeholder=" …")
    return Problem(where, f"no {thing} can be loaded from {path}: {said}", cure)
