from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tvkd_fast.data.reading.formats import BadPair, Preference, to_preference
from tvkd_fast.data.tokenization import PairTokenizer, TokenizedPair, tokenize_pair, truncate_pair

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]

PLAIN = Preference("xa", "b y", "z", "train.jsonl row 4")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = Preference([user("Why?")], [assistant("Because.")], [assistant("No.")], "train.jsonl row 4")


def decode(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def test_plain_pair_has_a_token_border_and_ends(chatml: PreTrainedTokenizerFast) -> None:
    pair = tokenize_pair(replace(PLAIN, chosen="c y"), chatml)
    assert [decode(chatml, [i]) for i in pair.prompt_ids] == ["x", "a"]
    assert [decode(chatml, [i]) for i in pair.chosen_ids] == ["c", " ", "y", "<|im_end|>"]
    assert [decode(chatml, [i]) for i in pair.rejected_ids] == ["z", "<|im_end|>"]
    assert (pair.chosen_ended, pair.rejected_ended, pair.row) == (True, True, "train.jsonl row 4")
    assert not pair.merged


def test_a_token_that_holds_the_border_is_the_responses(chatml: PreTrainedTokenizerFast) -> None:
    assert chatml.tokenize("ab") == ["ab"]
    pair = tokenize_pair(PLAIN, chatml)
    assert [decode(chatml, [i]) for i in pair.prompt_ids] == ["x"]
    assert [decode(chatml, [i]) for i in pair.chosen_ids] == ["ab", " ", "y", "<|im_end|>"]
    assert [decode(chatml, [i]) for i in pair.rejected_ids] == ["a", "z", "<|im_end|>"]
    assert pair.merged
    with pytest.raises(BadPair, match=r"row 4: prompt without tokens \(the tokenizer merges all of it"):
        tokenize_pair(replace(PLAIN, prompt="a"), chatml)
    with pytest.raises(BadPair, match=r"row 4: response without tokens \(rejected\)"):
        tokenize_pair(replace(PLAIN, rejected=""), chatml)


@pytest.mark.parametrize("mode", ["auto", "never"])
def test_plain_pair_stays_plain(chatml: PreTrainedTokenizerFast, mode: Any) -> None:
    pair = tokenize_pair(PLAIN, chatml, chat_template=mode)
    assert decode(chatml, pair.prompt_ids + pair.chosen_ids) == "xab y<|im_end|>"


@pytest.mark.parametrize(("prefix", "suffix"), [("<s>", ""), ("<s>", "<|endoftext|>"), ("", "<|endoftext|>")])
def test_the_tokenizers_own_tokens_only_open_the_prompt(
    make_tokenizer: MakeTokenizer, prefix: str, suffix: str
) -> None:
    tokenizer = make_tokenizer(chat_template=None, eos="<|endoftext|>", prefix=prefix, suffix=suffix)
    pair = tokenize_pair(replace(PLAIN, chosen="c y"), tokenizer)
    assert decode(tokenizer, pair.prompt_ids) == f"{prefix}xa"
    assert decode(tokenizer, pair.chosen_ids) == "c y<|endoftext|>"


def test_an_end_token_that_the_prompt_itself_holds_stays(templateless: PreTrainedTokenizerFast) -> None:
    pair = tokenize_pair(Preference("x<|endoftext|>", "y", "z", "row 0"), templateless)
    assert decode(templateless, pair.prompt_ids) == "<s>x<|endoftext|>"


def test_a_plain_response_that_spells_its_own_end_ends_once(templateless: PreTrainedTokenizerFast) -> None:
    pair = tokenize_pair(Preference("x", "y<|endoftext|>", "z<s>", "row 0"), templateless)
    assert decode(templateless, pair.chosen_ids) == "y<|endoftext|>"
    assert decode(templateless, pair.rejected_ids) == "z<s><|endoftext|>"


def test_chat_template_writes_prompt_and_response(chatml: PreTrainedTokenizerFast) -> None:
    pair = tokenize_pair(CHAT, chatml)
    assert decode(chatml, pair.prompt_ids) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert decode(chatml, pair.chosen_ids) == "Because.<|im_end|>"
    assert decode(chatml, pair.rejected_ids) == "No.<|im_end|>"
    assert pair.chosen_ids[-1] == chatml.eos_token_id


def test_template_is_tokenized_without_further_special_tokens(make_tokenizer: MakeTokenizer) -> None:
    pair = tokenize_pair(CHAT, make_tokenizer(prefix="<s>", suffix="<|endoftext|>"))
    assert pair == tokenize_pair(CHAT, make_tokenizer())


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        pytest.param("<|eot_id|>", "Because.<|eot_id|>", id="end of turn is not the end of sequence"),
        pytest.param("<|eot_id|>\n", "Because.<|eot_id|>", id="newline after it"),
        pytest.param(" <|endoftext|>", "Because. <|endoftext|>", id="space before it"),
        pytest.param("\n", "Because.<|endoftext|>", id="no end in the template"),
        pytest.param("", "Because.<|endoftext|>", id="nothing at all"),
    ],
)
def test_response_ends_as_the_template_ends_turns(make_tokenizer: MakeTokenizer, end: str, expected: str) -> None:
    tokenizer = make_tokenizer(TURNS.replace("END", end), eos="<|endoftext|>")
    pair = tokenize_pair(CHAT, tokenizer)
    assert decode(tokenizer, pair.chosen_ids) == expected
    assert pair.chosen_ended


def test_without_a_template_the_dialogue_is_written_as_in_hh(templateless: PreTrainedTokenizerFast) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yes?"), user("Why?")]
    pair = tokenize_pair(
        Preference(prompt, [assistant("So."), assistant("Yes.")], [assistant("No.")], "row 0"), templateless
    )
    text = "<s>\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    assert decode(templateless, pair.prompt_ids) == text
    assert decode(templateless, pair.chosen_ids) == " So.\n\nAssistant: Yes.<|endoftext|>"
    assert decode(templateless, pair.rejected_ids) == " No.<|endoftext|>"


def test_never_puts_the_template_aside(chatml: PreTrainedTokenizerFast) -> None:
    pair = tokenize_pair(CHAT, chatml, chat_template="never")
    assert decode(chatml, pair.prompt_ids + pair.chosen_ids) == "\n\nHuman: Why?\n\nAssistant: Because.<|im_end|>"


def test_template_that_rewrites_the_prompt_is_an_error_with_a_remedy(make_tokenizer: MakeTokenizer) -> None:
    rewriting = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    message = r"train.jsonl row 4: .*writes the prompt otherwise.*--data.chat_template never"
    with pytest.raises(BadPair, match=message):
        tokenize_pair(CHAT, make_tokenizer(rewriting))


def test_template_that_refuses_a_conversation_makes_it_a_bad_pair(make_tokenizer: MakeTokenizer) -> None:
    refusing = "{{ raise_exception('roles must take turns') }}"
    with pytest.raises(BadPair, match=r"row 4: refused by the chat template \(roles must take turns\)"):
        tokenize_pair(CHAT, make_tokenizer(refusing))


def test_tokenizer_without_an_end_is_an_error_with_a_remedy(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*set tokenizer\.eos_token"):
        tokenize_pair(PLAIN, make_tokenizer(eos=None))


def test_unknown_chat_template_setting(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="chat_template is 'always': give 'auto' or 'never'"):
        PairTokenizer(chatml, chat_template="always")  # type: ignore[arg-type]


def test_pairs_without_tokens_are_bad(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadPair, match=r"row 0: response without tokens \(rejected\)"):
        tokenize_pair(Preference("x", "y", "", "row 0"), chatml)
    with pytest.raises(BadPair, match=r"row 0: response without tokens \(chosen\)"):
        tokenize_pair(Preference([user("x")], [assistant("")], [assistant("y")], "row 0"), chatml)
    with pytest.raises(BadPair, match="row 0: prompt without tokens"):
        tokenize_pair(Preference("", "y", "z", "row 0"), chatml)


def test_responses_with_the_same_tokens_are_bad(make_tokenizer: MakeTokenizer) -> None:
    trimming = make_tokenizer(TURNS.replace("m['content']", "m['content'] | trim").replace("END", "<|im_end|>"))
    pair = Preference([user("x")], [assistant("y")], [assistant(" y ")], "row 3")
    with pytest.raises(BadPair, match=r"row 3: chosen equals rejected \(both responses have the same tokens\)"):
        tokenize_pair(pair, trimming)


TEXT = st.text(alphabet="ab \né", min_size=1, max_size=6).filter(str.strip)


@given(st.lists(TEXT, min_size=2, max_size=2, unique_by=str.strip), st.lists(TEXT, min_size=1, max_size=3))
def test_ids_spell_the_text_whatever_the_format(
    chatml: PreTrainedTokenizerFast,
    templateless: PreTrainedTokenizerFast,
    answers: list[str],
    asked: list[str],
) -> None:
    turns = [(user, assistant)[i % 2](text) for i, text in enumerate(asked)]
    chat = Preference(turns, [assistant(answers[0])], [assistant(answers[1])], "row 0")
    whole = chatml.apply_chat_template([*turns, assistant(answers[0])], tokenize=False)
    pair = tokenize_pair(chat, chatml)
    assert decode(chatml, pair.prompt_ids + pair.chosen_ids) + "\n" == whole
    plain = tokenize_pair(Preference(asked[0], answers[0], answers[1], "row 0"), templateless)
    merges = asked[0].endswith("a") and any(answer.startswith("b") for answer in answers)
    assert plain.merged == merges
    assert decode(templateless, plain.prompt_ids) == f"<s>{asked[0].removesuffix('a') if merges else asked[0]}"
    for ids, answer in ((plain.chosen_ids, answers[0]), (plain.rejected_ids, answers[1])):
        assert plain.prompt_ids + ids == templateless(f"{asked[0]}{answer}<|endoftext|>")["input_ids"]


EOS = 0
IDS = st.lists(st.integers(1, 2), min_size=1, max_size=8)


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> TokenizedPair:
    return TokenizedPair(prompt, [*chosen, EOS], [*rejected, EOS], True, True, "train.jsonl row 9")


def truncated(pair: TokenizedPair, max_length: int, truncation: Any) -> tuple[TokenizedPair, bool] | BadPair:
    try:
        return truncate_pair(pair, max_length=max_length, truncation=truncation)
    except BadPair as bad:
        return bad


@given(IDS, IDS, IDS, st.integers(2, 20))
def test_keep_start_keeps_the_prompt_and_the_start_of_both_responses(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int
) -> None:
    whole = pair_of(prompt, chosen, rejected)
    result = truncated(whole, max_length, "keep_start")
    if isinstance(result, BadPair):
        left = max_length - len(prompt)
        assert left < 1 or whole.chosen_ids[:left] == whole.rejected_ids[:left]
        return
    cut, was_cut = result
    assert was_cut == (cut != whole)
    assert cut.prompt_ids == prompt
    for ids, before, ended in (
        (cut.chosen_ids, whole.chosen_ids, cut.chosen_ended),
        (cut.rejected_ids, whole.rejected_ids, cut.rejected_ended),
    ):
        assert ids == (prompt + before)[len(prompt) : max_length]
        assert ids
        assert len(prompt + ids) <= max_length
        assert ended == (ids[-1] == EOS)


@given(IDS, IDS, IDS, st.integers(2, 20))
def test_keep_end_keeps_both_responses_and_the_end_of_the_prompt(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int
) -> None:
    whole = pair_of(prompt, chosen, rejected)
    longer = max(len(whole.chosen_ids), len(whole.rejected_ids))
    result = truncated(whole, max_length, "keep_end")
    if isinstance(result, BadPair):
        assert longer >= max_length
        return
    cut, was_cut = result
    assert was_cut == (cut != whole)
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
    assert cut.chosen_ended
    assert cut.rejected_ended
    assert cut.prompt_ids
    assert cut.prompt_ids == prompt[-len(cut.prompt_ids) :]
    assert len(cut.prompt_ids) + longer == min(max_length, len(prompt) + longer)


@pytest.mark.parametrize(("length", "ended"), [(2, True), (3, True), (4, False)])
def test_a_response_that_just_fits_has_ended(length: int, ended: bool) -> None:
    whole = pair_of([1, 1], [2] * (length - 1), [1] * 5)
    cut, _ = truncate_pair(whole, max_length=5, truncation="keep_start")
    assert (cut.chosen_ended, cut.rejected_ended) == (ended, False)
    mirrored = replace(whole, chosen_ids=whole.rejected_ids, rejected_ids=whole.chosen_ids)
    cut, _ = truncate_pair(mirrored, max_length=5, truncation="keep_start")
    assert (cut.chosen_ended, cut.rejected_ended) == (False, ended)


def test_a_response_that_had_not_ended_has_not_ended_after_a_cut() -> None:
    whole = TokenizedPair([1], [2, 2, 2], [2, 3], False, False, "row 0")
    cut, _ = truncate_pair(whole, max_length=3, truncation="keep_start")
    assert (cut.chosen_ended, cut.rejected_ended) == (False, False)


@pytest.mark.parametrize(
    ("truncation", "prompt", "chosen", "message"),
    [
        (
            "keep_start",
            [1] * 4,
            [2],
            r"row 9: the prompt leaves no space for a response token \(4 prompt, 2 chosen and 3 rejected tokens, "
            r"max_length 4, keep_start\)\. Raise --data.max_length, .*--data.truncation keep_end.*--data.overlong drop",
        ),
        (
            "keep_end",
            [1],
            [2, 2, 2],
            r"row 9: the longer response leaves no space for a prompt token \(1 prompt, 4 chosen and 3 rejected .*"
            r"max_length 4, keep_end\)\. Raise --data.max_length, .*--data.overlong drop",
        ),
        (
            "keep_start",
            [1] * 3,
            [1, 2],
            r"row 9: the responses are the same where both are cut .*--data.max_length.*keep_end.*--data.overlong drop",
        ),
    ],
)
def test_pairs_that_cannot_be_cut_say_what_to_do(
    truncation: Any, prompt: list[int], chosen: list[int], message: str
) -> None:
    with pytest.raises(BadPair, match=message):
        truncate_pair(pair_of(prompt, chosen, [1, 1]), max_length=4, truncation=truncation)


def test_senseless_truncation_settings() -> None:
    pair = pair_of([1], [1], [2])
    with pytest.raises(ValueError, match=r"max_length is 1: .* need at least 2"):
        truncate_pair(pair, max_length=1, truncation="keep_start")
    with pytest.raises(ValueError, match="truncation is 'middle': give 'keep_start' or 'keep_end'"):
        truncate_pair(pair, max_length=9, truncation="middle")  # type: ignore[arg-type]


def test_tokenizers_that_list_special_tokens_only_as_added_ones_end_turns(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(TURNS.replace("END", "<|eot_id|>\n"), eos="<|endoftext|>")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert eot not in tokenizer.all_special_ids
    assert eot in PairTokenizer(tokenizer).special_ids
    slow: Any = SimpleNamespace(eos_token_id=7, chat_template=None, all_special_ids=[7, 8])
    assert PairTokenizer(slow).special_ids == {7, 8}


def test_a_template_that_asks_for_the_date_gets_a_fixed_one(make_tokenizer, chatml) -> None:
    dated = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = make_tokenizer(chat_template=dated + "{{ date_string }}" + chatml.chat_template)
    pair = Preference(
        [{"role": "user", "content": "a"}], *([{"role": "assistant", "content": c}] for c in "xy"), "row 0"
    )
    assert tokenizer.decode(tokenize_pair(pair, tokenizer).prompt_ids).startswith("26 Jul 2024")


WRITTEN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": WRITTEN, "chosen": [{"role": "assistant", "content": "a"}], "rejected": CHAT.rejected},
        {"prompt": WRITTEN, "system": "Be brief.", "chosen": "a", "rejected": "b"},
        {"prompt": f" \n{WRITTEN}", "system": "", "chosen": "a", "rejected": "b"},
        {"prompt": "Why?<|im_end|>\n<|im_start|>assistant\n", "system": "", "chosen": "a", "rejected": "b"},
    ],
)
def test_text_that_a_template_wrote_is_not_written_again(chatml: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    with pytest.raises(BadPair, match="row 3: a chat template has written the prompt, and would write it again"):
        tokenize_pair(to_preference(row, "row 3"), chatml)


def test_a_special_token_that_a_text_speaks_of_is_not_a_templates(chatml: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "What does <|im_end|> mean, or <s>? ", "chosen": "An end.", "rejected": "b"}
    assert not tokenize_pair(to_preference(row, "row 3"), chatml).written_before
    assert not tokenize_pair(to_preference(row | {"system": ""}, "row 3"), chatml).written_before
    assert tokenize_pair(to_preference(row | {"prompt": WRITTEN}, "row 3"), chatml).written_before


def test_a_prompt_alone_needs_a_template_for_what_it_carries(templateless: PreTrainedTokenizerFast) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    with pytest.raises(BadPair, match=r"row 3: only a chat template .*\(tool_calls in messages\)"):
        PairTokenizer(templateless).prompt_ids(asked, "row 3")
    with pytest.raises(BadPair, match=r"row 3: only a chat template .*\(tools\)"):
        PairTokenizer(templateless).prompt_ids(asked[:1], "row 3", {"tools": [{"name": "f"}]})
