"""Text goes in and comes out whole: no half characters, no special tokens; templates as HuggingFace's."""

import json
from pathlib import Path

import jinja2
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from engine.errors import BadRequest
from server.tokenizer import Detokenizer, Tokenizer
from tests.server.builders import save_tokenizer

EMOJI = "a 🦊 and 漢字, naïve"


def pieces(detokenizer: Detokenizer, tokens: list[int]) -> list[str]:
    return [*(detokenizer.feed(token) for token in tokens), detokenizer.flush()]


def test_a_character_spread_over_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(EMOJI, add_special_tokens=False)
    found = pieces(tokenizer.detokenizer([]), tokens)
    assert len(tokens) > len(EMOJI), "the test needs characters of several tokens"
    assert "".join(found) == EMOJI
    assert not any("\ufffd" in piece for piece in found)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40))
def test_any_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer.detokenizer([1, 2]), tokens)) == text


def test_an_unfinished_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("x🦊", add_special_tokens=False)[:-1]
    detokenizer = tokenizer.detokenizer([])
    assert "".join(detokenizer.feed(token) for token in tokens) == "x"
    assert set(detokenizer.flush()) == {"\ufffd"}


def test_broken_bytes_without_end_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.encode("🦊", add_special_tokens=False)[-1]
    detokenizer = tokenizer.detokenizer([])
    said = "".join(detokenizer.feed(continuation) for _ in range(100))
    assert len(said) > 50


def test_special_tokens_are_silent_and_cost_nothing_to_repeat(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer(tokenizer.encode("the fox", add_special_tokens=False))
    assert "".join(detokenizer.feed(2) for _ in range(1000)) == ""
    assert len(detokenizer._ids) < 20  # what is decoded again for every token
    (token,) = tokenizer.encode(" fox", add_special_tokens=False)[-1:]
    assert detokenizer.feed(token) != ""


def test_spaces_of_sentencepiece_tokens_survive_at_the_start_of_an_answer(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "▁fox": 2}
    tokens = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.decoder = tokenizers.decoders.Metaspace()
    tokens.save(str(tmp_path / "tokenizer.json"))
    assert pieces(Tokenizer(tmp_path).detokenizer([1]), [2, 1]) == [" fox", " the", ""]


def test_templates_are_rendered_as_huggingface_renders_them(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{% if loop.first %}{% continue %}{% endif %}!{% endfor %}\n"
        "  {%- set ns = namespace(n=messages | length) %}{{ ns.n }}{{ eos_token }}"
        "{{ messages[0].content.strip() }}{% if tools %}tools{% endif %}{{ strftime_now('%Y') }}"
        "{{ {'b': 1, 'a': [2]} | tojson(indent=2) }}\n"
    )
    folder = save_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)  # goes before the one in tokenizer_config.json
    messages = [{"role": "user", "content": " <ü> "}, {"role": "assistant", "content": "b"}]
    (expected,), _ = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    assert Tokenizer(folder).render_chat(messages) == expected


def test_named_templates_use_the_default_one(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, template=None)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer(folder).render_chat([{"role": "user", "content": "hi"}]) == "yes"


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__ }}"
    with pytest.raises(BadRequest) as refusal:
        Tokenizer(save_tokenizer(tmp_path, template)).render_chat([{"role": "user", "content": "hi"}])
    assert isinstance(refusal.value.__cause__, SecurityError)


def test_a_broken_template_is_noticed_at_start(tmp_path: Path) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        Tokenizer(save_tokenizer(tmp_path, "{% for %}"))


def test_the_complaint_of_a_template_reaches_the_caller(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="no role wizard"):
        tokenizer.render_chat([{"role": "wizard", "content": "hi"}])


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no chat template"):
        Tokenizer(save_tokenizer(tmp_path, template=None)).render_chat([{"role": "user", "content": "hi"}])


def test_truncation_left_in_the_file_does_not_cut_prompts(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path)
    tokens = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens.enable_truncation(4)
    tokens.enable_padding(length=50)
    tokens.save(str(folder / "tokenizer.json"))
    assert 10 < len(Tokenizer(folder).encode("the quick " * 8, add_special_tokens=False)) < 50


def test_tokens_are_bytes_that_add_up_to_the_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(EMOJI, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in tokens).decode() == EMOJI
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.token_bytes(10**6) == b""


def test_tokens_of_sentencepiece_are_bytes_too(tmp_path: Path) -> None:
    pieces = {"<unk>": 0, "\u2581the": 1, "fox": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    model = tokenizers.models.BPE(vocab=pieces, merges=[], unk_token="<unk>", byte_fallback=True)
    tokens = tokenizers.Tokenizer(model)
    tokens.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    tokens.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [1, 2, *(3 + byte for byte in "🦊".encode())]
    assert b"".join(tokenizer.token_bytes(token) for token in ids).decode() == " thefox🦊"
