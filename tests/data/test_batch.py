import torch
from hypothesis import given
from hypothesis import strategies as st

from tvkd_fast.data import collate_pairs, micro_batches
from tvkd_fast.data.tokenization import TokenizedPair

ids = st.lists(st.integers(1, 99), min_size=1, max_size=7)
pairs = st.builds(TokenizedPair, ids, ids, ids, st.booleans(), st.booleans(), st.just("row"))


@given(st.lists(pairs, min_size=1, max_size=5))
def test_each_state_predicts_its_token(dataset):
    batch = collate_pairs(dataset, range(len(dataset)))
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.predicting + 1], batch.labels)
    rows = [(p.prompt_ids, p.chosen_ids, p.chosen_ended) for p in dataset]
    rows += [(p.prompt_ids, p.rejected_ids, p.rejected_ended) for p in dataset]
    width = batch.input_ids.shape[1]
    assert width == max(len(prompt) + len(response) for prompt, response, _ in rows)
    for i, (prompt, response, ended) in enumerate(rows):
        assert batch.labels[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist() == response
        states = batch.states[batch.cu_states[i] : batch.cu_states[i + 1]].tolist()
        s_0 = i * width + len(prompt) - 1
        assert states == list(range(s_0, s_0 + len(response) + 1))
        assert batch.predicting[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]].tolist() == states[:-1]
        assert batch.input_ids[i, : len(prompt) + len(response)].tolist() == prompt + response
        assert batch.ended[i] == ended
    assert batch.num_tokens == sum(len(prompt) + len(response) for prompt, response, _ in rows)
    assert batch.num_pairs == len(dataset)


@given(st.lists(pairs, min_size=1, max_size=9), st.integers(1, 4))
def test_micro_batches_hold_every_pair_once_and_like_lengths_together(dataset, size):
    batches = list(micro_batches(dataset, range(len(dataset)), size=size))
    assert sorted(int(i) for b in batches for i in b.pairs) == list(range(len(dataset)))
    assert all(b.num_pairs <= size for b in batches)
    widths = [b.input_ids.shape[1] for b in batches]
    assert widths == sorted(widths)


def test_sft_batches_hold_chosen_rows_only():
    pair = TokenizedPair([1, 2], [3, 4], [5], True, False, "row")
    batch = collate_pairs([pair], [7], chosen_only=True)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]
    assert batch.labels.tolist() == [3, 4]
    assert batch.cu_seqlens.tolist() == [0, 2]
    assert batch.ended.tolist() == [True]
    assert batch.pairs.tolist() == [7]


def test_a_batch_moves_whole():
    batch = collate_pairs([TokenizedPair([1], [2], [3], True, True, "row")], [0]).to("meta")
    assert batch.input_ids.device.type == batch.ended.device.type == batch.states.device.type == "meta"
    assert batch.num_tokens == 4
