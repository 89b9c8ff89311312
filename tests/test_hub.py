"""A hub that cannot be reached is found out once, quickly, and said with the name that was looked for."""

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from burnish import hub
from burnish.config.schema import DataConfig, ModelConfig
from burnish.data.tokenizer import load_tokenizer
from burnish.errors import DataError
from burnish.launch import free_port


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As outside the tests: the hub may be asked, but it is a port where nobody listens."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub._hub_answers.cache_clear()
    yield
    hub._hub_answers.cache_clear()


def test_a_mistyped_folder_is_answered_at_once_without_the_librarys_retries(caplog, capfd):
    begun = time.monotonic()
    with pytest.raises(DataError, match="there is no folder nosuch, no tokenizer of that name") as caught:
        load_tokenizer(ModelConfig(path="nosuch"), DataConfig.model_validate({"train": "d.jsonl"}))
    assert time.monotonic() - begun < 10  # with the retries it takes over 20
    assert caught.value.problems[0].where == "model.path" and caught.value.problems[0].cure
    assert "Retrying" not in caplog.text + capfd.readouterr().err


def test_a_hub_that_listens_is_asked(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not hub.only_cached("org/name")
    assert not hub.only_cached("org/other")  # asked once


def test_a_proxy_is_not_second_guessed_and_a_folder_needs_no_hub(monkeypatch, tmp_path):
    assert hub.only_cached("org/name") and not hub.only_cached(str(tmp_path))
    hub._hub_answers.cache_clear()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert not hub.only_cached("org/name")


def test_what_the_library_says_stays_on_one_line_and_whole():
    error = ValueError("Couldn't instantiate the backend tokenizer from one of: \n(1) a file\n(2) a slow one")
    problem = hub.not_loaded("MODEL", "/", "model", error, "Give another.")
    assert problem.what.endswith("from one of: (1) a file (2) a slow one")
