"""Generation with a finished model or adapter: greedy answers, and a conversation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from burnish.config.check import require_model
from burnish.errors import ConfigError, DataError, Problem
from burnish.hub import not_loaded
from burnish.runtime import quieten_libraries


@final
class Speaker:
    """A model and its tokenizer, ready to answer.

    Args:
        path: Folder or hub name of a model or an adapter.
        max_tokens: Longest answer.

    Raises:
        ConfigError: It cannot be loaded.
        DataError: Its tokenizer has no chat template.
    """

    def __init__(self, path: str, max_tokens: int = 512) -> None:
        require_model(path)
        import torch

        from burnish.model.finished import load_finished, load_finished_tokenizer

        quieten_libraries()
        try:
            self._model: Any = load_finished(path)
            self._tokenizer: Any = load_finished_tokenizer(path, padding_side="left")
        except (OSError, ValueError) as error:
            cure = "Give a model folder, an adapter folder, or a hub name."
            raise ConfigError(not_loaded("MODEL", path, "model", error, cure)) from error
        if self._tokenizer.chat_template is None:
            raise DataError(
                Problem(path, "its tokenizer has no chat template", "Chat with a trained result.")
            )
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_tokens = max_tokens
        self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        """The likeliest answer to each conversation, all in one padded batch.

        Raises:
            ConfigError: The chat template refuses a conversation: a system message, for one.
        """
        import torch
        from jinja2 import TemplateError

        try:
            inputs = self._tokenizer.apply_chat_template(
                [list(turns) for turns in conversations],
                add_generation_prompt=True,
                padding=True,
                return_tensors="pt",
                return_dict=True,
            ).to(self._model.device)
        except TemplateError as error:
            has_system = any(turns and turns[0]["role"] == "system" for turns in conversations)
            cure = "Leave --system out, or say it in the prompt." if has_system else "Look at the template."
            raise ConfigError(
                Problem("chat template", f"refuses this conversation: {error}", cure)
            ) from error
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            out = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        new = out[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)]


def talk(path: str, prompt: str | None, system: str | None, max_tokens: int) -> None:
    """Answer one prompt, or keep a conversation going until the input ends.

    Raises:
        ConfigError: The model cannot be loaded, its template refuses the conversation, or no answer may
            be as short as `max_tokens`.
    """
    if max_tokens < 1:
        raise ConfigError(Problem("--max-tokens", f"is {max_tokens}", "Give at least 1."))
    speaker = Speaker(path, max_tokens)
    turns = [] if system is None else [{"role": "system", "content": system}]
    if prompt is not None:
        print(speaker.answer([[*turns, {"role": "user", "content": prompt}]])[0])  # noqa: T201
        return
    print("Type a message; Ctrl-D or an empty line ends.")  # noqa: T201
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": speaker.answer([turns])[0]})
        print(turns[-1]["content"])  # noqa: T201
