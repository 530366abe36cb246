"""The rules by which a kernel gets its owners, one by one, on graphs made by hand."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import torch
from torch.fx import Graph

from fxnvtx.compile.labels import _move, fused_text, moved_row
from fxnvtx.compile.owners import Before, Owners, Step, common, input_shapes

ATEN = torch.ops.aten


def _step(key, path):
    return Step(0, path, path.rpartition(".")[2], key.partition("@")[2])


def _owners():
    return Owners(_step)


def _chain(*paths, call=""):
    return tuple(Step(0, p, p.rpartition(".")[2], call) for p in paths)


def _node(graph, target, *args, stack=None, **meta):
    node = graph.call_function(target, args)
    if stack is not None:
        meta["nn_module_stack"] = {f"{i}": (path, object) for i, path in enumerate(stack)}
        meta["source_fn_stack"] = [("x", target)]
    node.meta.update(meta)
    return node


def test_what_dynamo_wrote_down():
    graph = Graph()
    x = graph.placeholder("x")
    inner = _node(graph, ATEN.relu.default, x, stack=["block", "block.act"])
    root = _node(graph, ATEN.sin.default, inner, source_fn_stack=[("sin", torch.sin)])
    backward = _node(graph, ATEN.cos.default, root, fwd_nn_module_stack={"7": ("block", object)})
    owners = _owners()
    assert owners.chains(inner) == (_chain("block", "block.act"),)
    assert owners.chains(root) == ((),)
    assert owners.chains(backward) == (_chain("block"),)


def test_a_node_of_a_pass_goes_with_its_users_else_its_inputs_else_nobody():
    graph = Graph()
    x = graph.placeholder("x")
    a = _node(graph, ATEN.relu.default, x, stack=["a"])
    b = _node(graph, ATEN.relu.default, x, stack=["b"])
    between = _node(graph, ATEN.clone.default, a)
    _node(graph, ATEN.sin.default, between, stack=["b"])
    last = _node(graph, ATEN.clone.default, a)
    torn = _node(graph, ATEN.add.Tensor, a, b)
    owners = _owners()
    assert owners.chains(between) == (_chain("b"),)
    assert owners.chains(last) == (_chain("a"),)
    assert owners.chains(torn) == ()
    row = owners.row([a, torn])
    assert row.chains == (_chain("a"), ())  # what a and b have in common stands for what is not known
    assert row.unknown


def test_the_users_of_a_result_are_found_behind_views_without_a_record():
    """What torch 2.11 makes of a softmax: an operation with two results, of which neither has one, nor `sub`."""
    graph = Graph()
    x = graph.placeholder("x")
    normed = _node(graph, ATEN.relu.default, x, stack=["norm"])
    both = _node(graph, ATEN.var_mean.correction, normed)
    first, second = (_node(graph, operator.getitem, both, n) for n in (0, 1))
    _node(graph, ATEN.sub.Tensor, normed, first)
    _node(graph, ATEN.div.Tensor, normed, second, stack=["soft"])
    assert _owners().chains(both) == (_chain("soft"),)


def test_a_sum_of_gradients_belongs_to_what_its_terms_share():
    graph = Graph()
    x = graph.placeholder("x")
    a = _node(graph, ATEN.relu.default, x, stack=["block", "block.a"])
    b = _node(graph, ATEN.relu.default, x, stack=["block", "block.b"])
    total = _node(graph, ATEN.add.Tensor, a, b, is_gradient_acc=True, stack_trace="somewhere")
    assert _owners().chains(total) == (_chain("block"),)


def test_a_replacement_has_the_owners_of_what_it_replaced():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = _node(graph, ATEN.mm.default, x, y, stack=["linear"])
    kept = _node(graph, ATEN.relu.default, x, stack=["elsewhere"])
    total = _node(graph, ATEN.add.Tensor, kept, product)
    before = Before(graph)
    with graph.inserting_after(total):
        merged = graph.call_function(ATEN.addmm.default, (kept, x, y))
    merged.meta["from_node"] = [SimpleNamespace(name=""), SimpleNamespace(name=total.name)]
    total.replace_all_uses_with(merged)
    graph.erase_node(total)
    graph.erase_node(product)
    assert _owners().chains(merged, before) == (_chain("linear"),)
    assert _owners().chains(merged) == (_chain("elsewhere"),)  # without the comparison only its inputs tell


def test_views_and_constants_count_only_among_themselves():
    graph = Graph()
    x = graph.placeholder("x")
    view = _node(graph, ATEN.view.default, x, [2], stack=["viewer"])
    work = _node(graph, ATEN.relu.default, view, stack=["worker"])
    filled = _node(graph, ATEN.full.default, [2], 0.0, stack=["filler"])
    owners = _owners()
    assert owners.row([x, view, work, filled]).chains == (_chain("worker"),)
    assert owners.row([view]).chains == (_chain("viewer"),)
    assert owners.row([x]).chains == ()
    assert owners.row([x]).unknown


def test_common_ancestor():
    assert common([_chain("a", "a.b"), _chain("a", "a.c")]) == _chain("a")
    assert common([_chain("a"), _chain("a", "a.b")]) == _chain("a")
    assert common([_chain("a"), _chain("b")]) == ()
    assert common([_chain("a"), _chain("a", call="1")]) == ()  # two calls are two


def test_long_lists_are_cut_and_counted():
    assert fused_text(["a", "b", "a"]) == "fused(a, b)"
    assert fused_text(["a"], "why") == "fused(a, unknown: why)"
    assert fused_text(list("abcdefg")) == "fused(a, b, c, d, 3 more)"


def test_shapes_are_those_of_fixed_inputs_that_are_no_weights():
    graph = Graph()
    x, weight, loose = graph.placeholder("x"), graph.placeholder("weight"), graph.placeholder("loose")
    turned = _node(graph, ATEN.permute.default, weight, [1, 0])
    x.meta["val"], weight.meta["val"] = torch.empty(2, 3), torch.empty(4, 3)
    turned.meta["val"] = torch.empty(3, 4)
    product = _node(graph, ATEN.mm.default, x, turned)
    result = _node(graph, ATEN.add.Tensor, product, loose)
    assert input_shapes([turned, product, result], {weight}) == [[2, 3]]
    assert input_shapes([product], {weight}) == [[2, 3]]
    assert input_shapes([product], set()) == [[2, 3], [3, 4]]


def test_moving_from_the_traced_block_to_the_one_at_hand():
    traced = {"blocks.0", "blocks.0.up", "blocks.0.mlp.down"}
    assert _move(traced, {"blocks.2.up", "blocks.2.mlp.down"}) == ("blocks.0", "blocks.2")
    assert _move(traced, {"blocks.0.up"}) == ("", "")
    assert _move(traced, {"head"}) is None
    assert _move(traced, set()) is None
    row = ((((0, "blocks.0", "0", ""), (0, "blocks.0.up", "up", "")),), "")
    assert moved_row(row, ((0, "blocks.0", "blocks.2"),)) == (
        (((0, "blocks.2", "0", ""), (0, "blocks.2.up", "up", "")),),
        "",
    )
    chains, unknown = moved_row(row, ((0, "", None),))
    assert chains == ((),)
    assert unknown
