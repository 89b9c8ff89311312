"""The quick way to a token's weight gives what looking at every token gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_on_the_spot import byte_level, llama2_kind

from burnish.data.mask import _without_post_processor
from burnish.data.weights import token_weights, weights_by_offsets

_BACKENDS = {
    "bytes": _without_post_processor(byte_level(["<|im_end|>"]).backend_tokenizer),
    "pieces": _without_post_processor(llama2_kind().backend_tokenizer),
}
_LETTERS = st.sampled_from([*"abz  \n", "<|im_end|>", "é", "e\u0301", "你", "\U0001f600", "\u200b", "\u2581"])


@pytest.mark.parametrize("kind", _BACKENDS)
@settings(max_examples=200, deadline=None)
@given(parts=st.lists(_LETTERS, min_size=1, max_size=30), data=st.data())
def test_looking_up_borders_is_looking_at_every_token(kind, parts, data):
    text = "".join(parts)
    position = st.integers(0, len(text))
    spans = [
        (min(a, b), max(a, b), weight)
        for a, b, weight in data.draw(
            st.lists(st.tuples(position, position, st.sampled_from([0.5, 1.0, 2.0])), max_size=4)
        )
    ]
    encoding = _BACKENDS[kind].encode(text, add_special_tokens=False)
    nonempty = [span for span in spans if span[0] < span[1]]
    expected = weights_by_offsets(encoding.offsets, nonempty)
    assert np.array_equal(token_weights(encoding, spans), expected), (text, spans, encoding.offsets)
