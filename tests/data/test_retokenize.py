import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tvkd_fast.data import BadPair, MicroBatching, build_dataset, retokenize
from tvkd_fast.data.dataset import PairDataset, report_of
from tvkd_fast.data.formats import Preference
from tvkd_fast.data.synthetic import preference_rows
from tvkd_fast.data.tokenization import tokenize_pair, truncate_pair
from tvkd_fast.models import load_tokenizer

TURNS = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def trained(texts, normalizer=None, chat_template=TURNS):
    """A byte-level tokenizer of 400 tokens, trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


def words(rows):
    for row in rows:
        for part in (row["prompt"], row["chosen"], row["rejected"]):
            yield from [part] if isinstance(part, str) else (message["content"] for message in part)


@pytest.fixture(scope="module")
def bundled():
    """The tokenizer that is trained on the bundled pairs."""
    return trained(words(preference_rows("train", 200)))


def says(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def own_of(text, tokenizer, other, cut_to=1024, truncation="keep_start", **options):
    """One preference in the tokens of both."""
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
        assert says(bundled, pair.chosen_ids) == text.chosen[0]["content"].rstrip() + "</s>"
        assert says(bundled, pair.prompt_ids).endswith("</s>[assistant] ")
    assert sum(len(p.chosen_ids) for p in own) < 0.7 * sum(len(p.chosen_ids) for p in dataset)


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


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(lambda s: s.strip()),
    st.integers(2, 60),
)
def test_a_cut_response_ends_at_the_same_character(chatml, bundled, answer, room):
    text = Preference("Q", answer, f"{answer}x", "row 0")
    try:
        pair, own = own_of(text, chatml, bundled, cut_to=1 + room)
    except BadPair:
        return
    read = own[0]
    assert read.chosen_ended is pair.chosen_ended
    ours, theirs = says(chatml, pair.chosen_ids), says(bundled, read.chosen_ids)
    if not pair.chosen_ended:
        assert ours.rstrip("\ufffd") == theirs
    else:
        assert ours.removesuffix("<|im_end|>") == theirs.removesuffix("</s>") == answer


def test_a_cut_inside_a_character_leaves_it_out(chatml, bundled):
    text = Preference("Q", "abc漢字", "abcde漢字", "row 0")
    pair, own = own_of(text, chatml, bundled, cut_to=5)
    assert says(chatml, pair.chosen_ids) == "abc\ufffd"
    assert says(bundled, own[0].chosen_ids) == "abc"


def test_only_the_response_that_was_cut_is_cut(chatml, bundled):
    pair, own = own_of(conversation("A rather long answer.", "Short"), chatml, bundled, cut_to=40)
    read = own[0]
    assert (read.chosen_ended, read.rejected_ended) == (pair.chosen_ended, pair.rejected_ended) == (False, True)
    assert says(bundled, read.chosen_ids) == says(chatml, pair.chosen_ids) != "A rather long answer."
    assert says(bundled, read.rejected_ids) == "Short</s>"


def test_a_prompt_that_was_cut_is_read_whole(chatml, bundled):
    text = Preference("A prompt of some length", "yes", "no", "row 0")
    pair, own = own_of(text, chatml, bundled, cut_to=8, truncation="keep_end")
    assert says(chatml, pair.prompt_ids) != text.prompt
    assert says(bundled, own[0].prompt_ids) == text.prompt


def test_text_that_the_teachers_tokens_change_is_refused_by_row(chatml):
    lower = trained(["say it"], normalizers.Lowercase())
    own_of(conversation("yes"), chatml, trained(["say it"]))
    with pytest.raises(
        BadPair, match=r"row 7: the teacher's tokens cannot be made: its text is not .* \(in the prompt"
    ):
        own_of(conversation("yes"), chatml, lower)


def test_text_that_the_teachers_template_leaves_out_is_refused_by_row(chatml):
    forgetful = trained(["say"], chat_template=TURNS.replace("m['content']", "m['content'].split('.')[0]"))
    with pytest.raises(BadPair, match="its text is not what the teacher's tokens say"):
        own_of(conversation("Yes. And more."), chatml, forgetful)


def test_white_space_and_composed_letters_are_the_same_text(chatml):
    composing = trained(["say"], normalizers.NFKC(), TURNS.replace("m['content']", "m['content'].strip()"))
    _, own = own_of(conversation("  Cafe\u0301, ﬁne  "), chatml, composing)
    assert says(composing, own[0].chosen_ids) == "Café, fine</s>"


def test_what_a_cut_left_must_be_known(chatml, bundled):
    text = conversation("A rather long answer.")
    pair, _ = truncate_pair(tokenize_pair(text, chatml), max_length=40, truncation="keep_start")
    report = report_of([pair], source="test", max_length=40, truncation="keep_start")
    other = conversation("Something else")
    with pytest.raises(BadPair, match=r"row 7: the text that a cut response has left .* Raise --data.max_length"):
        retokenize(PairDataset([pair], report, [other]), chatml, bundled, max_length=100)


def test_a_teacher_that_reads_less_is_counted(chatml, bundled):
    dataset = build_dataset("bundled:train:10", chatml)
    lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in dataset]
    own = retokenize(dataset, chatml, bundled, max_length=max(lengths))
    shorter = max(len(p.prompt_ids) + len(p.chosen_ids) for p in own) - 1
    cut = retokenize(dataset, chatml, bundled, max_length=shorter)
    assert cut.report.truncated > 0
    assert f"cut to {shorter} tokens" in str(cut.report)
    assert len(cut) == 10


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_length": 2}, "leaves no room"), ({"batching": MicroBatching(tokens=8)}, "longer than a packed row")],
)
def test_a_pair_that_the_teacher_cannot_read_is_refused_by_row(chatml, bundled, options, reason):
    with pytest.raises(BadPair, match=rf"row 7: the teacher's tokens cannot be made: .*{reason}.*--tokens_per_micro"):
        own_of(conversation("yes"), chatml, bundled, **options)


def test_the_text_goes_with_the_pairs_that_are_kept(write_jsonl, chatml):
    rows = [{"prompt": "p", "chosen": f"{i}", "rejected": "" if i == 1 else "x"} for i in range(3)]
    dataset = build_dataset(write_jsonl(rows), chatml, bad_pairs="drop")
    assert [text.chosen for text in dataset.texts] == ["0", "2"]
    assert [text.row for text in dataset.texts] == [pair.row for pair in dataset]
