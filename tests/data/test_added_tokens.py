"""Tokens that a run adds to its tokenizer, and data that uses tokens without a row."""

import numpy as np
import pytest
from tokenizers_on_the_spot import byte_level, llama2_kind

from burnish.config.schema import DataConfig, ModelConfig
from burnish.data.control import ControlTokens
from burnish.data.store import ExampleStore
from burnish.data.tokenizer import load_tokenizer, vocabulary_of
from burnish.data.vocabulary import require_rows
from burnish.errors import ConfigError
from burnish.records import Example

DATA = DataConfig.model_validate({"train": "x"})


@pytest.fixture(params=[llama2_kind, lambda: byte_level(["<|im_end|>"])], ids=["llama2", "bytes"])
def folder(request, tmp_path):
    request.param().save_pretrained(str(tmp_path))
    return tmp_path


def test_new_tokens_come_last_and_in_order(folder):
    before = load_tokenizer(ModelConfig(path=str(folder)), DATA)[0]
    model = ModelConfig(
        path=str(folder), add_tokens={"<|b|>": "special", "kWh": "ordinary", "<|a|>": "special"}
    )
    after, _ = load_tokenizer(model, DATA)
    size = len(before)
    ids = after.convert_tokens_to_ids(["<|b|>", "kWh", "<|a|>"])
    assert ids == [size, size + 1, size + 2] and len(after) == size + 3
    vocabulary = vocabulary_of(after, model)
    assert vocabulary.named == vocabulary.new == set(ids)
    assert after.decode(ids, skip_special_tokens=True).strip() == "kWh"
    assert after.tokenize("it costs 5kWh")[-1] == "kWh"
    assert {"<|a|>", "<|b|>"} <= set(ControlTokens(after.backend_tokenizer).names)
    assert "kWh" not in ControlTokens(after.backend_tokenizer).names, "a word that is typed is that word"


def test_tokens_that_are_there_stay_as_they_are(folder, tmp_path):
    eos = str(load_tokenizer(ModelConfig(path=str(folder)), DATA)[0].eos_token)
    model = ModelConfig(path=str(folder), add_tokens=("<|a|>", eos))
    first, _ = load_tokenizer(model, DATA)
    first.save_pretrained(str(tmp_path / "result"))
    again = model.model_copy(update={"path": str(tmp_path / "result")})
    second, _ = load_tokenizer(again, DATA)
    assert second.get_vocab() == first.get_vocab()
    vocabulary = vocabulary_of(second, again)
    assert vocabulary.new == frozenset() and len(vocabulary.named) == 2
    # Where the model has no row for one that the tokenizer has, naming it makes it a new token all the same.
    assert vocabulary.fresh(len(second) - 1) == (len(second) - 1,)
    assert vocabulary.num_rows(len(second) - 1) == len(second)


def test_nothing_asked_for_nothing_changed(folder):
    model = ModelConfig(path=str(folder))
    tokenizer, _ = load_tokenizer(model, DATA)
    assert vocabulary_of(tokenizer, model).num_rows(7) == 7


def store(*ids):
    tokens = np.array(ids, np.int32)
    return ExampleStore.from_examples([Example("s", "s:1", tokens, np.ones(len(ids), np.float32))])


def test_tokens_without_a_row_are_only_wrong_where_they_are_used(folder):
    tokenizer, _ = load_tokenizer(ModelConfig(path=str(folder), add_tokens=("<|new|>",)), DATA)
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    require_rows(tokenizer, new + 1, [store(1, new), None])
    require_rows(tokenizer, new, [store(1, 2), None])
    with pytest.raises(ConfigError, match=r"<\|new\|>.*\n.*model.add_tokens"):
        require_rows(tokenizer, new, [store(1, 2), store(3, new)])
