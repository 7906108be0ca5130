import re
from dataclasses import replace

import pytest
from draws import draws
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from tvkd_fast.data import BadPair, build_dataset, retokenize
from tvkd_fast.data.dataset import PairDataset, report_of
from tvkd_fast.data.reading.formats import Preference
from tvkd_fast.data.tokenization import tokenize_pair, truncate_pair
from tvkd_fast.models import load_tokenizer
from tvkd_fast.synthetic.bundled import preference_rows

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def trained(train_tokenizer):
    def train(texts, normalizer=None, chat_template=TURNS):
        return train_tokenizer(texts, chat_template, normalizer)

    return train


def words(rows):
    for row in rows:
        for part in (row["prompt"], row["chosen"], row["rejected"]):
            yield from [part] if isinstance(part, str) else (message["content"] for message in part)


@pytest.fixture(scope="module")
def bundled(trained):
    """The tokenizer that is trained on the bundled pairs."""
    return trained(words(preference_rows("train", 200)))


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def own_of(text, tokenizer, other, cut_to=1024, truncation="keep_start", **options):
    """Return one preference in the tokens of both."""
    pair, _ = truncate_pair(tokenize_pair(text, tokenizer), max_length=cut_to, truncation=truncation)
    report = report_of([pair], source="test", max_length=cut_to, truncation=truncation)
    settings = {"max_length": 10_000} | options
    return pair, retokenize(PairDataset([pair], report, [text]), tokenizer, other, **settings)


def conversation(chosen, rejected="no"):
    prompt = [{"role": "user", "content": "Say it."}]
    return Preference(prompt, *([{"role": "assistant", "content": x}] for x in (chosen, rejected)), "row 7")


def test_bundled_pairs_keep_order_text_and_ends(chatml, bundled):
    dataset = build_dataset("bundled:train:40", chatml)
    own = retokenize(dataset, chatml, bundled, max_length=1024)
    assert [pair.row for pair in own] == [pair.row for pair in dataset]
    assert own.report.truncated == 0
    for text, pair in zip(dataset.texts, own, strict=True):
        assert pair.chosen_ended
        answer = text.chosen[0]["content"].rstrip()
        assert text_of(bundled, pair.prompt_ids + pair.chosen_ids).endswith(f"</s>[assistant] {answer}</s>")
        # The space behind it is the prompt's where no token holds both.
        assert text_of(bundled, pair.prompt_ids).endswith("</s>[assistant]" if pair.merged else "</s>[assistant] ")
    assert sum(len(p.chosen_ids) for p in own) < 0.7 * sum(len(p.chosen_ids) for p in dataset)


@pytest.mark.slow
def test_the_packaged_tokenizer_reads_what_the_trained_one_wrote(bundled):
    try:
        packaged = load_tokenizer("smollm2-135m")
    except ValueError as missing:
        pytest.skip(str(missing))
    for ours, theirs in ((bundled, packaged), (packaged, bundled)):
        dataset = build_dataset("bundled:train:40", ours, max_length=60, overlong="drop")
        own = retokenize(dataset, ours, theirs, max_length=1024)
        assert any(not pair.chosen_ended for pair in dataset)
        for pair, read in zip(dataset, own, strict=True):
            for name in ("chosen", "rejected"):
                end = getattr(pair, f"{name}_ended")
                assert getattr(read, f"{name}_ended") is end
                a, b = (
                    tokenizer.decode(getattr(x, f"{name}_ids"), skip_special_tokens=True)
                    for tokenizer, x in ((ours, pair), (theirs, read))
                )
                assert a.strip() == b.strip()


@draws(60, fresh=True)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(lambda s: s.strip()),
    st.integers(2, 60),
)
def test_a_cut_response_ends_at_the_same_character(chatml, bundled, answer, left):
    text = Preference("Q", answer, f"{answer}x", "row 0")
    try:
        pair, own = own_of(text, chatml, bundled, cut_to=1 + left)
    except BadPair:
        return
    read = own[0]
    assert read.chosen_ended is pair.chosen_ended
    ours, theirs = text_of(chatml, pair.chosen_ids), text_of(bundled, read.chosen_ids)
    if not pair.chosen_ended:
        assert ours.rstrip("\ufffd") == theirs
    else:
        assert ours.removesuffix("<|im_end|>") == theirs.removesuffix("</s>") == answer


def test_a_cut_inside_a_character_leaves_it_out(chatml, bundled):
    text = Preference("Q", "abc漢字", "abcde漢字", "row 0")
    pair, own = own_of(text, chatml, bundled, cut_to=5)
    assert text_of(chatml, pair.chosen_ids) == "abc\ufffd"
    assert text_of(bundled, own[0].chosen_ids) == "abc"


def test_only_the_response_that_was_cut_is_cut(chatml, bundled):
    pair, own = own_of(conversation("A rather long answer.", "Short"), chatml, bundled, cut_to=40)
    read = own[0]
    assert (read.chosen_ended, read.rejected_ended) == (pair.chosen_ended, pair.rejected_ended) == (False, True)
    assert text_of(bundled, read.chosen_ids) == text_of(chatml, pair.chosen_ids) != "A rather long answer."
    assert text_of(bundled, read.rejected_ids) == "Short</s>"


def test_a_prompt_that_was_cut_is_read_whole(chatml, bundled):
    text = Preference("A prompt of some length", "yes", "no", "row 0")
    pair, own = own_of(text, chatml, bundled, cut_to=8, truncation="keep_end")
    assert text_of(chatml, pair.prompt_ids) != text.prompt
    assert text_of(bundled, own[0].prompt_ids) == text.prompt


def test_text_that_the_teachers_tokens_change_is_refused_by_row(chatml, trained):
    lower = trained(["say it"], normalizers.Lowercase())
    own_of(conversation("yes"), chatml, trained(["say it"]))
    with pytest.raises(
        BadPair, match=r"row 7: the teacher's tokens cannot be made: its text is not .* \(in the prompt"
    ):
        own_of(conversation("yes"), chatml, lower)


def test_text_that_the_teachers_template_leaves_out_is_refused_by_row(chatml, trained):
    forgetful = trained(["say"], chat_template=TURNS.replace("m['content']", "m['content'].split('.')[0]"))
    with pytest.raises(BadPair, match="its text is not what the teacher's tokens say"):
        own_of(conversation("Yes. And more."), chatml, forgetful)


def test_white_space_and_composed_letters_are_the_same_text(chatml, trained):
    composing = trained(["say"], normalizers.NFKC(), TURNS.replace("m['content']", "m['content'].strip()"))
    _, own = own_of(conversation("  Cafe\u0301, ﬁne  "), chatml, composing)
    assert text_of(composing, own[0].chosen_ids) == "Café, fine</s>"


def test_a_turn_that_repeats_another_must_be_there_twice(chatml, trained):
    without_answers = TURNS.replace("m in messages", "m in messages if m['role'] == 'user' or m == messages[-1]")
    turns = [("user", "Hi"), ("assistant", "Hi"), ("user", "What now?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    text = replace(conversation("Yes."), prompt=prompt)
    own_of(text, chatml, trained(["say"]))
    with pytest.raises(BadPair, match=r"row 7: .* \(in the prompt\)"):
        own_of(text, chatml, trained(["say"], chat_template=without_answers))


@pytest.mark.parametrize("tail", [" </s>", "!end!</s>", "\n!end!\n</s>"])
def test_what_a_template_writes_after_an_answer_is_no_part_of_a_cut_one(chatml, trained, tail):
    tailed = trained(["say"], chat_template=TURNS.replace("</s>", tail))
    pair, own = own_of(conversation("A rather long answer."), chatml, tailed, cut_to=40)
    assert text_of(tailed, own[0].chosen_ids) == text_of(chatml, pair.chosen_ids) == "A rather long "
    assert text_of(tailed, own[0].rejected_ids) == f"no{tail}"


def test_what_a_template_writes_before_an_answer_is_none_of_its_text(chatml, make_tokenizer, bundled):
    thinking = make_tokenizer(
        chat_template=chatml.chat_template.replace(
            "{{ m['content'] }}",
            "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}",
        )
    )
    pair, own = own_of(conversation("A rather long answer."), thinking, bundled, cut_to=55)
    assert text_of(thinking, pair.chosen_ids) == "<think></think>A rather long "
    assert text_of(bundled, own[0].prompt_ids + own[0].chosen_ids).endswith("[assistant] A rather long ")
    with pytest.raises(BadPair, match="a cut left nothing of an answer's text"):
        own_of(conversation("   A rather long answer."), thinking, bundled, cut_to=43)


def test_composed_letters_are_found_again(make_tokenizer, bundled):
    composing = make_tokenizer()
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    text = Preference("Q", "Cafe\u0301 and a long rest", "Cafe\u0301 or not", "row 0")
    pair, own = own_of(text, composing, bundled, cut_to=14)
    assert text_of(bundled, own[0].chosen_ids) == text_of(composing, pair.chosen_ids) == "Café and a l"


def test_special_tokens_of_one_are_no_plain_text_of_the_other(chatml, bundled):
    for written in ("<|im_end|>", "</s>"):
        with pytest.raises(BadPair, match=rf"row 7: .* plain text to the other \('{re.escape(written)}'\)"):
            own_of(conversation(f"Yes{written}"), chatml, bundled)


def test_rows_that_are_refused_are_counted(chatml, trained, bundled):
    dataset = build_dataset("bundled:train:10", chatml)
    with pytest.raises(BadPair, match=r"bundled:train:10 row 0: .*, and 9 more rows\)\. Leave such rows out"):
        retokenize(dataset, chatml, trained(["say"], normalizers.Replace("e", "o")), max_length=1024)
    dataset.texts.clear()
    with pytest.raises(ValueError, match="have lost their text"):
        retokenize(dataset, chatml, bundled, max_length=1024)


def test_a_template_that_cannot_be_used_is_the_teachers(chatml, trained):
    odd = trained(["say"], chat_template=TURNS.replace("[assistant] ", "[assistant] <think>"))
    with pytest.raises(ValueError, match=r"row 7: the teacher's tokens .*--data.teacher_chat_template never"):
        own_of(conversation("yes"), chatml, odd)
    _, own = own_of(conversation("yes"), chatml, odd, other_chat_template="never")
    assert text_of(odd, own[0].prompt_ids).endswith("\n\nAssistant:")
    odd.eos_token = None
    with pytest.raises(ValueError, match="of the teacher: the tokenizer has no end-of-sequence token"):
        own_of(conversation("yes"), chatml, odd)


def test_a_teacher_that_reads_less_is_counted(chatml, bundled):
    dataset = build_dataset("bundled:train:10", chatml)
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in dataset]
    own = retokenize(dataset, chatml, bundled, max_length=max(lengths))
    shorter = max(len(p.prompt_ids) + len(p.chosen_ids) for p in own) - 1
    cut = retokenize(dataset, chatml, bundled, max_length=shorter)
    assert cut.report.truncated > 0
    assert f"cut to {shorter} tokens" in str(cut.report)
    assert len(cut) == 10


def test_a_pair_that_the_teacher_cannot_read_is_refused_by_row(chatml, bundled):
    with pytest.raises(
        BadPair, match=r"row 7: the teacher's tokens cannot be made: .*leaves no space.*another teacher"
    ):
        own_of(conversation("yes"), chatml, bundled, max_length=2)


def test_the_text_goes_with_the_pairs_that_are_kept(write_jsonl, chatml):
    rows = [{"prompt": "p", "chosen": f"{i}", "rejected": "" if i == 1 else "x"} for i in range(3)]
    dataset = build_dataset(write_jsonl(rows), chatml, bad_pairs="drop")
    assert [text.chosen for text in dataset.texts] == ["0", "2"]
    assert [text.row for text in dataset.texts] == [pair.row for pair in dataset]
