from __future__ import annotations

import random

import pytest
import torch

from mixquant_sglang.kernels.rows import EagerRows, GraphRows, row_numbers
from mixquant_sglang.passes.queries import Queries
from mixquant_sglang.passes.rows import RequestRows, RowSplit, split_rows


def eager(rows: RowSplit, device: torch.device) -> EagerRows:
    return EagerRows(rows.total, rows.protected, device)


def protected(requests: list[RequestRows], last: bool = True) -> list[int]:
    return row_numbers(split_rows(requests, last_prompt_token=last).protected).tolist()


def test_last_prompt_token_of_each_finishing_request() -> None:
    requests = [RequestRows(new=5, prefix=0, prompt=5), RequestRows(new=3, prefix=7, prompt=10)]
    assert protected(requests) == [4, 7]
    assert protected(requests, last=False) == []


def test_middle_chunks_have_no_protected_row() -> None:
    assert protected([RequestRows(new=128, prefix=0, prompt=300)]) == []
    assert protected([RequestRows(new=128, prefix=128, prompt=300)]) == []
    assert protected([RequestRows(new=44, prefix=256, prompt=300)]) == [43]


def test_a_longer_tail_of_the_prompt() -> None:
    def tail(k: int, *requests: RequestRows) -> list[int]:
        return row_numbers(split_rows(requests, last_prompt_token=True, tail=k).protected).tolist()

    assert tail(3, RequestRows(5, 0, 5), RequestRows(3, 7, 10), RequestRows(2, 0, 90)) == [2, 3, 4, 5, 6, 7]
    assert tail(99, RequestRows(4, 0, 4)) == [0, 1, 2, 3]
    assert tail(64, RequestRows(128, 128, 300), RequestRows(44, 256, 300)) == [*range(108, 128), *range(128, 172)]


def test_full_cache_hit_is_one_protected_row() -> None:
    rows = split_rows([RequestRows(new=1, prefix=299, prompt=300)], last_prompt_token=True)
    assert rows.protected_total == rows.total == 1


def test_decode_rows_of_a_mixed_batch() -> None:
    requests = [RequestRows(127, 0, 500), RequestRows(1, 26, 20, decoding=True), RequestRows(1, 90, 60, decoding=True)]
    rows = split_rows(requests, last_prompt_token=True)
    assert (rows.total, rows.prefill, rows.decode) == (129, 127, 2)
    assert row_numbers(rows.protected).tolist() == [127, 128]
    assert protected(requests, last=False) == [127, 128]


def test_a_first_decode_step_in_a_mixed_batch_is_not_taken_for_a_prompt() -> None:
    # A request whose only token so far is its first generated one: position prompt, one row.
    assert protected([RequestRows(1, 20, 20, decoding=True)]) == [0]


def test_generated_tokens_prefilled_again_after_a_retraction() -> None:
    # 50 prompt tokens and 8 generated ones; the tree kept 40 tokens, or all of the prompt.
    assert protected([RequestRows(new=18, prefix=40, prompt=50)]) == list(range(9, 18))
    assert protected([RequestRows(new=18, prefix=40, prompt=50)], last=False) == list(range(10, 18))
    assert protected([RequestRows(new=8, prefix=50, prompt=50)]) == list(range(8))


def test_a_request_that_asked_for_bf16() -> None:
    assert protected([RequestRows(3, 0, 900), RequestRows(4, 8, 12, bf16=True)], last=False) == [3, 4, 5, 6]


def test_adjacent_ranges_are_joined() -> None:
    rows = split_rows([RequestRows(1, 4, 5), RequestRows(1, 9, 10), RequestRows(6, 0, 9)], last_prompt_token=True)
    assert rows.protected == ((0, 2),)


def test_against_a_position_by_position_rule() -> None:
    rng = random.Random(0)
    for _ in range(300):
        requests, expected, row = [], [], 0
        for _ in range(rng.randrange(1, 6)):
            prompt, prefix = rng.randrange(1, 40), rng.randrange(0, 45)
            decoding, bf16 = rng.random() < 0.2, rng.random() < 0.2
            new = 1 if decoding else rng.randrange(1, 30)
            requests.append(RequestRows(new, prefix, prompt, decoding, bf16))
            for position in range(prefix, prefix + new):
                if decoding or bf16 or position >= prompt - 1:
                    expected.append(row)
                row += 1
        rows = split_rows(requests, last_prompt_token=True)
        assert row_numbers(rows.protected).tolist() == expected
        assert rows.total == row == rows.prefill + rows.decode
        assert rows.protected_total == len(expected)


def test_eager_rows_gather_and_scatter_exactly_the_protected_rows() -> None:
    requests = [RequestRows(3, 0, 3), RequestRows(4, 0, 90), RequestRows(2, 0, 1, decoding=True)]
    rows = eager(split_rows(requests, last_prompt_token=True), torch.device("cpu"))
    assert rows.tokens == 9 and rows.index.tolist() == [2, 7, 8]
    assert rows.slots.tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, 2] and rows.slots.dtype is torch.int32
    x = torch.randn(9, 4)
    assert torch.equal(rows.gather(x), x[[2, 7, 8]])
    out = torch.full((9, 5), torch.nan)
    rows.scatter(out, torch.ones(3, 5))
    assert torch.equal(out[[2, 7, 8]], torch.ones(3, 5)) and bool(out[[0, 1, 3, 4, 5, 6]].isnan().all())


def test_graph_rows_share_one_index_and_keep_its_inverse() -> None:
    rows = GraphRows(4, 16, torch.device("cpu"))
    large, small = rows.of(16), rows.of(8)
    assert large.index.data_ptr() == small.index.data_ptr() and large.slots.data_ptr() == small.slots.data_ptr()
    rows.fill(((2, 4), (7, 8)))
    assert large.index.tolist() == [2, 3, 7, -1] and small.slots.tolist() == [-1, -1, 0, 1, -1, -1, -1, 2]
    rows.fill(((15, 16),))
    assert large.index.tolist() == [15, -1, -1, -1] and large.slots.tolist() == [-1] * 15 + [0]
    rows.fill(())
    assert large.index.tolist() == [-1] * 4 and set(large.slots.tolist()) == {-1}
    assert rows.of(3).index.tolist() == [-1] * 3
    with pytest.raises(ValueError, match="a prefill graph of 17 rows"):
        rows.of(17)


def test_queries_are_the_last_rows_of_each_request() -> None:
    requests = [
        RequestRows(5, 0, 5),
        RequestRows(4, 0, 90),
        RequestRows(6, 20, 22),
        RequestRows(1, 9, 4, decoding=True),
    ]
    rows = split_rows(requests, last_prompt_token=True)
    assert rows.shares == ((5, 1), (4, 0), (6, 5), (1, 1))
    queries = Queries(rows.shares, torch.device("cpu"))
    assert (queries.requests, queries.tokens, queries.longest) == (4, 16, 5)
    assert queries.index.tolist() == [4, 8, 10, 11, 12, 13, 14, 15]  # row 8: a middle chunk, that nobody reads
    assert queries.starts.tolist() == [0, 1, 2, 7, 8] and queries.starts.dtype is torch.int32
    assert {*row_numbers(rows.protected).tolist()} <= {*queries.index.tolist()}
