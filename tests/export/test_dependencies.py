"""Sources of results."""

import torch

from worldloom.export.dependencies import Dependencies


def sources(function):
    a, b, c = torch.ones(3), torch.ones(3), torch.ones(3)
    with torch.no_grad(), Dependencies({"a": a, "b": b, "c": c}) as dependencies:
        result = function(a, b, c)
    return dependencies.find(result), dependencies.random


def test_results_have_the_sources_of_what_they_are_computed_from():
    assert sources(lambda a, b, c: torch.where(a > 0, b.exp(), 2.0)) == ({"a", "b"}, set())
    assert sources(lambda a, b, c: torch.ones(3))[0] == set()
    assert sources(lambda a, b, c: torch.stack([a, c]).sum(0)[1:])[0] == {"a", "c"}


def test_a_shape_is_not_a_source():
    assert sources(lambda a, b, c: torch.zeros_like(a) + a.new_zeros(len(a)) + b)[0] == {"b"}


def test_overwritten_memory_has_the_sources_of_what_is_written():
    assert sources(lambda a, b, c: torch.empty_like(a).copy_(b))[0] == {"b"}
    assert sources(lambda a, b, c: torch.mul(b, c, out=torch.empty(3)))[0] == {"b", "c"}

    def write_a_view(a, b, c):
        x = torch.zeros(2, 3)
        x[1].copy_(c)
        return x.sum()

    assert sources(write_a_view)[0] == {"c"}


def test_random_numbers_are_named():
    assert sources(lambda a, b, c: a + torch.rand(3)) == ({"a"}, {"aten::rand"})
    assert sources(lambda a, b, c: torch.dropout(a, 0.5, False)) == ({"a"}, set())
