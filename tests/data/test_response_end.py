import pytest

from tvkd_fast.data.chat_template import TEMPLATE_DAY, apply_template
from tvkd_fast.data.reading.formats import to_preference
from tvkd_fast.data.response_end import ResponseEnds
from tvkd_fast.data.tokenization import PairTokenizer, tokenize_pair

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}END{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def ends_of(make_tokenizer):
    """`ResponseEnds` of a template that ends turns so, and what it makes of a text: where it cuts that, or None."""

    def make(end, *, eos="<|endoftext|>", stops=()):
        tokenizer = make_tokenizer(None if end is None else TURNS.replace("END", end), eos=eos)
        ends = ResponseEnds(tokenizer, tokenizer.convert_tokens_to_ids(list(stops)))

        def cut(text):
            ids, found = ends.cut(tokenizer(text, add_special_tokens=False)["input_ids"])
            return tokenizer.decode(ids) if found else None

        return ends, cut

    return make


def test_each_kind_of_stop_ends_a_response(ends_of):
    ends, cut = ends_of("<|im_end|>\n", stops=["<|eot_id|>"])
    assert ends.generation_stops == sorted(ends.stop_ids)
    for stop in ("<|endoftext|>", "<|eot_id|>", "<|im_end|>"):
        assert cut(f"Yes.{stop}") == cut(f"Yes.{stop} \n") == f"Yes.{stop}"
    assert cut("Yes.<s>") is None
    assert cut("Yes.") is None


def test_the_first_of_several_ends_it_and_text_behind_one_does_not(ends_of):
    _, cut = ends_of("<|im_end|>\n", stops=["<|eot_id|>"])
    assert cut("Yes.<|eot_id|>\n<|im_end|><|endoftext|>\n") == "Yes.<|eot_id|>"
    assert cut("Yes.<|im_end|>\nAnd no.") is None
    assert cut("Yes.<|im_end|>\n<|im_start|>assistant: And no.<|im_end|>\n").endswith("And no.<|im_end|>")
    # What opens another turn is none of the text behind an end.
    assert cut("Yes.<|im_end|>\n<|im_start|>") is None


@pytest.mark.parametrize(
    ("end", "kept"),
    [
        ("<|eot_id|>\n<s>", "<|eot_id|>"),
        ("<|eot_id|>\n[the end]\n", "<|eot_id|>"),
        ("<s><|eot_id|>", "<s><|eot_id|>"),
        (" over<|eot_id|>", " over<|eot_id|>"),
    ],
)
def test_what_the_template_writes_behind_the_end_is_text_of_its_own(ends_of, end, kept):
    _, cut = ends_of(end)
    assert cut(f"Yes.{end}") == f"Yes.{kept}"


def test_an_added_token_that_is_not_special_ends_a_turn_too(make_tokenizer):
    tokenizer = make_tokenizer(TURNS.replace("END", "<|end|>\n"), eos="<|endoftext|>")
    tokenizer.add_tokens(["<|end|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ends = ResponseEnds(tokenizer)
    assert end not in ends.special_ids
    assert ends.cut([*tokenizer("Yes.")["input_ids"], end, *tokenizer("\n")["input_ids"]])[0][-1] == end


def test_a_template_that_ends_no_turn_and_none_at_all_leave_the_tokenizers_end(ends_of):
    for end in ("\n", "", None):
        ends, cut = ends_of(end)
        assert ends.stop_ids == {ends.eos_id}
        assert cut("Yes.<|endoftext|>") == "Yes.<|endoftext|>"


def test_a_template_that_wants_a_systems_turn_shows_its_end_all_the_same(make_tokenizer):
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = make_tokenizer(strict + TURNS.replace("END", "<|eot_id|>"), eos="<|endoftext|>")
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in ResponseEnds(tokenizer).stop_ids
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert ResponseEnds(tokenizer).stop_ids == {tokenizer.eos_token_id}


def test_a_stop_that_text_may_hold_stops_generation_alone(chatml):
    newline = chatml.convert_tokens_to_ids("Ċ")
    ends = ResponseEnds(chatml, [newline])
    assert ends.cut(chatml("Yes.\n")["input_ids"])[1] is False
    assert ends.generation_stops == sorted({newline, *ends.stop_ids})


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("{{ date_string }}", "26 Jul 2024"),
        ("{{ strftime_now('%d %B %Y, %A %-m %%Y') }}", TEMPLATE_DAY.strftime("%d %B %Y, %A %-m %%Y")),
        ("{% macro day(f) %}{{ 'on ' + strftime_now(f) }}{% endmacro %}{{ day('%Y-%m-%d') }}", "on 2024-07-26"),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%b') %}{% endif %}{{ d }}", "Jul"),
        ("\n  {% if true %}x{% endif %}\n", "\nx"),
    ],
)
def test_a_template_is_written_on_the_same_day(make_tokenizer, asked, written):
    tokenizer = make_tokenizer(asked)
    assert apply_template(tokenizer, [{"role": "user", "content": "a"}], tokenize=False) == written


def test_of_templates_by_name_and_with_a_date_of_the_rows_own(make_tokenizer):
    tokenizer = make_tokenizer({"default": "{{ strftime_now('%Y') }}", "tool_use": "{{ date_string }}"})
    message = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    assert apply_template(tokenizer, message, tokenize=False) == "2024"
    assert apply_template(tokenizer, message, tokenize=False, tools=[tool], date_string="now") == "now"


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
DEFAULT = TURNS.replace("END", "<|im_end|><|eot_id|>\n")
TOOL_USE = TURNS.replace("END", "<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        {"default": DEFAULT, "tool_use": TOOL_USE},
        f"{{% if tools %}}{TOOL_USE}{{% else %}}{DEFAULT}{{% endif %}}",
    ],
)
def test_a_turn_ends_as_the_rows_own_template_ends_it(make_tokenizer, template):
    tokenizer = make_tokenizer(template, eos="<|endoftext|>")
    row = {
        "prompt": [{"role": "user", "content": "a?"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    for tools, end in ((None, "<|im_end|><|eot_id|>"), ([TOOL], "<|im_end|>")):
        pair = tokenize_pair(to_preference(row | {"tools": tools}, "row 0"), tokenizer)
        assert tokenizer.decode(pair.chosen_ids) == f"a{end}"
        assert ResponseEnds(tokenizer).cut(pair.chosen_ids) == (pair.chosen_ids, True)
        assert not pair.written_before


def test_a_message_that_holds_more_than_its_content_ends_as_others_do(make_tokenizer):
    tokenizer = make_tokenizer(TURNS.replace("END", "{{ m.tool_calls }}<|eot_id|>"))
    call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
    row = {"prompt": [{"role": "user", "content": "a?"}], "chosen": [call], "rejected": [{**call, "content": "b"}]}
    pair = PairTokenizer(tokenizer)(to_preference(row, "row 0"), chosen_ended=False, rejected_ended=False)
    assert tokenizer.decode(pair.chosen_ids) == "[{'name': 'f'}]"
    assert tokenizer.decode(pair.rejected_ids) == "b[{'name': 'f'}]"
