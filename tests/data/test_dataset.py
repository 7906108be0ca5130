import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tvkd_fast.data.dataset import PairDataset, TokenReport, build_dataset, check_token_ids
from tvkd_fast.data.reading.formats import BadPair
from tvkd_fast.data.tokenization import TokenizedPair
from tvkd_fast.data.tokenizer_fingerprint import fingerprint_tokenizer

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
WriteJsonl = Callable[..., Path]

ROW = {"prompt": "12345", "chosen": "678", "rejected": "9"}
LONG_PROMPT = {**ROW, "prompt": "1" * 20}
LONG_ANSWER = {**ROW, "chosen": "2" * 20}
EMPTY = {**ROW, "chosen": ""}


def test_rows_become_pairs_in_order(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    dataset = build_dataset(write_jsonl([ROW, {**ROW, "prompt": "0"}]), chatml)
    assert len(dataset) == 2
    assert [pair.row for pair in dataset] == ["train.jsonl row 0", "train.jsonl row 1"]
    assert chatml.decode(dataset[1].prompt_ids + dataset[1].chosen_ids) == "0678<|im_end|>"
    assert dataset[0:2] == list(dataset)
    assert dataset[-1] == dataset[1]
    assert dataset.vocab_size_needed == 1 + max(max(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in dataset)


def test_report_counts_everything_that_happened(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    path = write_jsonl([ROW, LONG_PROMPT, EMPTY, LONG_ANSWER, {"chosen": "a b", "rejected": "c"}, EMPTY])
    dataset = build_dataset(path, chatml, max_length=12, overlong="drop", bad_pairs="drop")
    report = dataset.report
    assert (report.pairs, report.truncated, report.dropped_overlong) == (2, 1, 1)
    assert report.dropped_bad == {"empty response": 2, "prompts differ": 1}
    assert (report.prompt_tokens, report.chosen_tokens, report.rejected_tokens) == (10, 4 + 7, 4)
    assert str(report) == (
        f"2 pairs of {path}; 1 cut to 12 tokens (keep_start); 1 dropped: too long even when cut to 12 tokens; "
        "2 dropped: empty response; 1 dropped: prompts differ; "
        "tokens a pair: 5.0 prompt, 5.5 chosen, 2.0 rejected"
    )


def test_report_of_an_untouched_set_is_short(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    report = build_dataset(write_jsonl([ROW]), chatml).report
    assert str(report).endswith("train.jsonl; tokens a pair: 5.0 prompt, 4.0 chosen, 2.0 rejected")
    assert str(TokenReport(source="x", pairs=1548, max_length=512, truncation="keep_end")).startswith(
        "1,548 pairs of x"
    )


def test_keep_end_reaches_the_truncation(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    dataset = build_dataset(write_jsonl([LONG_PROMPT]), chatml, max_length=12, truncation="keep_end")
    assert len(dataset[0].prompt_ids) == 8
    assert dataset.report.truncated == 1


def test_overlong_and_bad_rows_stop_by_default(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadPair, match=r"train.jsonl row 1: the prompt leaves no space .*--data.overlong drop"):
        build_dataset(write_jsonl([ROW, LONG_PROMPT]), chatml, max_length=12, bad_pairs="drop")
    with pytest.raises(BadPair, match=r"train.jsonl row 1: empty response .*--data.bad_pairs drop"):
        build_dataset(write_jsonl([ROW, EMPTY]), chatml, overlong="drop")


def test_rows_that_only_tokens_show_to_be_bad(write_jsonl: WriteJsonl, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] | lower }}<|im_end|>{% endfor %}")
    user, yes, loud = (
        {"role": role, "content": text} for role, text in [("user", "x"), ("assistant", "y"), ("assistant", "Y")]
    )
    path = write_jsonl([ROW, {"prompt": [user], "chosen": [yes], "rejected": [loud]}])
    with pytest.raises(BadPair, match=r"row 1: chosen equals rejected \(both responses have .*--data.bad_pairs drop"):
        build_dataset(path, tokenizer)
    report = build_dataset(path, tokenizer, bad_pairs="drop").report
    assert report.dropped_bad == {"chosen equals rejected": 1}


def test_nothing_left_is_an_error_that_names_the_first_row(
    write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast
) -> None:
    message = r"train.jsonl: no pair is left of 1; the first one dropped was train.jsonl row 0: the prompt leaves"
    with pytest.raises(ValueError, match=message):
        build_dataset(write_jsonl([LONG_PROMPT]), chatml, max_length=12, overlong="drop")


def test_unknown_overlong_setting(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="overlong is 'cut': give 'error' or 'drop'"):
        build_dataset("x.jsonl", chatml, overlong="cut")  # type: ignore[arg-type]


def test_progress_goes_to_stderr(
    write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tqdm")
    build_dataset(write_jsonl([ROW]), chatml, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "tokenizing" in err


def test_bundled_sets(chatml: PreTrainedTokenizerFast) -> None:
    train = build_dataset("bundled:train:20", chatml)
    assert [pair.row for pair in train[:2]] == ["bundled:train:20 row 0", "bundled:train:20 row 1"]
    assert len(train) == 20
    assert len(build_dataset("bundled:eval", chatml, limit=3)) == 3
    assert all(pair.chosen_ids[-1] == chatml.eos_token_id for pair in train)
    for name in ("bundled:test", "bundled:train:0", "bundled:train:x", "bundled:train:2:3"):
        with pytest.raises(ValueError, match="is no bundled set: use bundled:train or bundled:eval"):
            build_dataset(name, chatml)


PAIR = TokenizedPair([1, 2], [3, 4], [5], True, True, "row 0")
REPORT = TokenReport(source="x", pairs=1, max_length=9, truncation="keep_start")


def fingerprint(*pairs: TokenizedPair) -> str:
    return PairDataset(pairs, REPORT).fingerprint


def test_fingerprint_is_of_ids_ends_and_order_only(write_jsonl: WriteJsonl, chatml: PreTrainedTokenizerFast) -> None:
    here = build_dataset(write_jsonl([ROW, LONG_PROMPT]), chatml)
    there = build_dataset(write_jsonl([ROW, LONG_PROMPT], "elsewhere/other.jsonl.gz"), chatml)
    assert here.fingerprint == there.fingerprint
    assert len(here.fingerprint) == 2 * hashlib.sha256().digest_size
    assert fingerprint(PAIR) == fingerprint(replace(PAIR, row="row 1"))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_ids": [2, 1]},
        {"prompt_ids": [1], "chosen_ids": [2, 3, 4]},
        {"chosen_ids": [3], "rejected_ids": [4, 5]},
        {"chosen_ids": [3, 5]},
        {"rejected_ids": [2**40]},
        {"chosen_ended": False},
        {"rejected_ended": False},
    ],
)
def test_fingerprint_sees_every_change(changes: dict[str, Any]) -> None:
    assert fingerprint(PAIR) != fingerprint(replace(PAIR, **changes))


def test_fingerprint_sees_order_and_count() -> None:
    other = replace(PAIR, rejected_ids=[6])
    assert len({fingerprint(*pairs) for pairs in ([PAIR], [PAIR, other], [other, PAIR], [PAIR, PAIR])}) == 4


@pytest.mark.parametrize("field", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_token_ids_outside_the_vocabulary_name_the_row(field: str) -> None:
    changes: dict[str, Any] = {field: [100], "row": "train.jsonl row 8"}
    check_token_ids([PAIR], 6)
    message = r"train.jsonl row 8 has token id 100, .*ends at 99: the tokenizer does not belong to this model"
    with pytest.raises(ValueError, match=message):
        check_token_ids([PAIR, replace(PAIR, **changes)], 100)


def test_tokenizer_fingerprint_outlives_saving_and_use(make_tokenizer: MakeTokenizer, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    before = fingerprint_tokenizer(tokenizer)
    assert before == fingerprint_tokenizer(make_tokenizer())
    tokenizer.pad_token = tokenizer.eos_token
    padded = fingerprint_tokenizer(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert fingerprint_tokenizer(tokenizer) == padded
    make_tokenizer().save_pretrained(tmp_path)
    assert fingerprint_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == before


@pytest.mark.parametrize(
    "changes",
    [{"chat_template": None}, {"eos": "<|endoftext|>"}, {"prefix": "<s>"}],
    ids=["template", "special token", "post-processor"],
)
def test_tokenizer_fingerprint_sees_every_change(make_tokenizer: MakeTokenizer, changes: dict[str, Any]) -> None:
    assert fingerprint_tokenizer(make_tokenizer(**changes)) != fingerprint_tokenizer(make_tokenizer())


def test_tokenizer_fingerprint_sees_vocabulary(make_tokenizer: MakeTokenizer) -> None:
    larger = make_tokenizer()
    larger.add_tokens(["new"])
    assert fingerprint_tokenizer(larger) != fingerprint_tokenizer(make_tokenizer())


def test_hh_with_a_byte_tokenizer(data_file: Callable[[str], Path], chatml: PreTrainedTokenizerFast) -> None:
    path = data_file("hh_harmless_eval.jsonl.gz")
    report = build_dataset(path, chatml, max_length=256, overlong="drop", bad_pairs="drop").report
    assert report.pairs + report.dropped_overlong == 255
    assert report.dropped_bad == {"prompts differ": 1}
    assert report.prompt_tokens + max(report.chosen_tokens, report.rejected_tokens) <= 256 * report.pairs
