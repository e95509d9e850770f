import collections

from worldloom.trees import flatten_tree, map_tree


def test_leaves_are_mapped_and_containers_are_new():
    tree = {"b": [1, (2, 3)], "a": collections.OrderedDict(c=4)}
    found = map_tree(lambda x: 10 * x, tree)
    assert found == {"b": [10, (20, 30)], "a": {"c": 40}}
    assert list(found) == ["b", "a"] and type(found["a"]) is dict
    assert tree["b"] == [1, (2, 3)]
    assert map_tree(str, 5) == "5"


def test_lists_and_tuples_may_get_one_type():
    tree = {"a": [1, (2, [3])]}
    assert map_tree(lambda x: x, tree, sequence=tuple) == {"a": (1, (2, (3,)))}
    assert map_tree(lambda x: x, tree, sequence=list) == {"a": [1, [2, [3]]]}


def test_names_of_leaves():
    tree = {"a": {"b": 1}, "c": [2, {"d": 3}]}
    assert flatten_tree(tree) == {"a/b": 1, "c": [2, {"d": 3}]}
    assert flatten_tree(tree, ".", lists=True) == {"a.b": 1, "c.0": 2, "c.1.d": 3}
    assert flatten_tree(tree, prefix="x") == {"x/a/b": 1, "x/c": [2, {"d": 3}]}
    assert flatten_tree(7) == {"": 7}
