"""The exchange between processes that train together."""

import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.rank_processes import run_ranks
from worldloom.ranks import Ranks, gather_rows, seed_of_rank, sum_counts, world_size


def exchange(rank):
    rows = torch.tensor([[rank, 1.0], [rank, 2.0]], requires_grad=True)
    gathered = gather_rows(rows)
    count = torch.tensor(rank + 1)
    total = sum_counts(count)
    ranks = Ranks()
    ranks.connect()
    return {
        "size": world_size(),
        "gathered": gathered,
        "total": total,
        "count": count,
        "shared": ranks.share(rank, 10 * rank),
        "items": ranks.gather({"rank": rank, "name": "x" * rank}),
        "decided": ranks.decide(rank + 5),
        "seeds": (seed_of_rank(0), seed_of_rank(0, 1), seed_of_rank(1)),
    }


def test_three_ranks_exchange_rows_counts_and_data():
    results = run_ranks(exchange, 3)
    for x in results:
        assert x["size"] == 3
        rows = [[rank, value] for rank in range(3) for value in (1.0, 2.0)]
        assert x["gathered"].tolist() == rows and not x["gathered"].requires_grad
        assert x["total"] == 6
        assert np.array_equal(x["shared"], [[0, 0], [1, 10], [2, 20]])
        assert x["items"] == [
            {"rank": 0, "name": ""},
            {"rank": 1, "name": "x"},
            {"rank": 2, "name": "xx"},
        ]
        assert x["decided"] == 5
    assert [x["count"] for x in results] == [1, 2, 3]  # not changed in place
    seeds = [seed for x in results for seed in x["seeds"]]
    assert len(set(seeds)) == 9


def test_one_process_exchanges_nothing():
    rows, count = torch.ones(2, 3), torch.tensor(4)
    assert gather_rows(rows) is rows
    assert sum_counts(count) is count
    assert seed_of_rank(3) == seed_of_rank(3, 1) == 3
    ranks = Ranks()
    ranks.connect()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert np.array_equal(ranks.share(1, 2), [[1, 2]])
    assert ranks.gather("x") == ["x"]
    assert ranks.decide(7) == 7


def fail(rank):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_the_error_of_a_rank_is_raised_and_the_others_are_killed():
    with pytest.raises(ValueError, match="the reason") as error:
        run_ranks(fail, 2)
    assert "rank 1" in str(error.value.__cause__) and "in fail" in str(error.value.__cause__)


def sleep(rank):
    time.sleep(600 * rank)


def test_ranks_that_hang_are_killed():
    with pytest.raises(TimeoutError, match=r"\[0, 1\]"):
        run_ranks(sleep, 2, seconds=2)
