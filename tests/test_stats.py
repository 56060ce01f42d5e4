"""Statistics of several tensors that share one DoubleSqueeze."""

import pytest
import torch
from support import generator

from ds_horovod import DoubleSqueeze
from ds_horovod.in_process import Workers
from ds_horovod.stats import combine_stats

KEYS = ("compressed_bytes_sent", "compressed_bytes_received", "dense_bytes_sent", "dense_bytes_received", "wait_seconds")


def stats(steps, value, ratio, norm):
    return {
        "steps": steps,
        **dict.fromkeys(KEYS, value),
        "compression_ratio": ratio,
        "worker_error_norm": norm,
        "server_error_norm": norm,
    }


def test_of_none_and_of_one():
    assert combine_stats([]) == {}
    assert combine_stats([stats(2, 5.0, 3.0, 1.0)]) == stats(2, 5.0, 3.0, 1.0)


def test_of_two_that_were_used_differently_often():
    total = combine_stats([stats(1, 10.0, 30.0, 3.0), stats(3, 2.0, 10.0, 4.0)])
    assert total["steps"] == 4
    assert all(total[key] == pytest.approx((1 * 10 + 3 * 2) / 4) for key in KEYS)
    assert total["worker_error_norm"] == total["server_error_norm"] == pytest.approx(5.0)
    uncompressed, sent = 1 * 20 * 30 + 3 * 4 * 10, 1 * 20 + 3 * 4
    assert total["compression_ratio"] == pytest.approx(uncompressed / sent)


def test_counting_begins_anew_where_one_says_so():
    g = generator(0)
    parameters = [("a", torch.zeros(100, 100, requires_grad=True))]
    workers = Workers(DoubleSqueeze, parameters, 2)

    def steps(count):
        for _ in range(count):
            workers.exchange([[torch.randn(100, 100, generator=g)] for _ in range(2)])

    squeeze = workers.squeezes[0]
    squeeze.reset_stats()  # before the first use: nothing to forget
    steps(5)
    before = squeeze.stats()
    squeeze.reset_stats()
    nothing = squeeze.stats()
    kept = ("worker_error_norm", "server_error_norm")
    assert all(nothing[key] == 0 for key in nothing if key not in (*kept, "compression_ratio"))
    assert all(nothing[key] == before[key] > 0 for key in kept) and nothing["compression_ratio"] == 1
    steps(2)
    after = squeeze.stats()
    assert after["steps"] == 2
    assert after["compression_ratio"] == before["compression_ratio"] > 7
    assert after["compressed_bytes_sent"] == before["compressed_bytes_sent"] > 0
    assert after["worker_pass_seconds"] > 0
