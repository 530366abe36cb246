"""Weights that move between memory and a memory-mapped file: bit for bit, exactly counted, really gone."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fxnvtx.errors import OutputError
from fxnvtx.pipeline.memory import ByteAccount, FileSlot, MemoryPlace, ResidencyRanges
from fxnvtx.pipeline.strategies import (
    ComponentOffload,
    LayerwiseOffload,
    Resident,
    SnapshotOffload,
    find_blocks,
)

from ..support.limits import CHILD_S
from .nets import Net, clone_weights, same_weights, weight_bytes

OFFLOADING = [ComponentOffload, SnapshotOffload, LayerwiseOffload]
EVERY = [Resident, *OFFLOADING]


class FailingPlace(MemoryPlace):
    """Memory that runs out: the n-th allocation from now fails."""

    left: int | None = None

    def allocate(self, nbytes):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise MemoryError("no room")
        return super().allocate(nbytes)


def hold(kind, module, place=None):
    account = ByteAccount()
    strategy = kind("net", place or MemoryPlace(), account, ResidencyRanges())
    strategy.refresh(module)
    strategy.finish_use(module)
    return strategy, account


def use(strategy, module, dtype=None):
    strategy.refresh(module)
    strategy.before_use(module, dtype)
    strategy.wait_for_use(module, dtype)


@pytest.mark.parametrize("kind", OFFLOADING)
def test_between_uses_nothing_is_in_memory_and_after_a_use_everything_is_as_it_was(kind):
    net = Net()
    weights, total = clone_weights(net), weight_bytes(net)
    wanted = net(torch.ones(2, 8))
    parameters = list(net.parameters())
    strategy, account = hold(kind, net)
    for _ in range(3):
        assert weight_bytes(net) == account.resident_bytes == 0
        account.reset_peak()
        use(strategy, net)
        assert torch.equal(net(torch.ones(2, 8)), wanted)
        strategy.finish_request(net)  # what is on its way is counted, but in no tensor yet
        assert account.resident_bytes == weight_bytes(net) <= strategy.bound_bytes
        strategy.finish_use(net)
        assert account.peak_bytes <= strategy.bound_bytes <= total
    strategy.bring_back(net)
    assert same_weights(net, weights)
    assert account.resident_bytes == total
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))


@pytest.mark.parametrize("at_once", [False, True])
def test_layerwise_keeps_two_blocks_and_what_is_outside_them(at_once, monkeypatch):
    """`at_once`: the next block is there before this one computes; else when the thread that moves it comes to it."""

    def moved(self, move):
        made = move()
        return SimpleNamespace(wait=lambda: made)

    if at_once:
        monkeypatch.setattr(MemoryPlace, "start", moved)
    net = Net(depth=6)
    block, outside = weight_bytes(net.blocks[0]), weight_bytes(net.embed, net.head) + net.shift.nbytes
    strategy, account = hold(LayerwiseOffload, net)
    assert strategy.bound_bytes == outside + 2 * block
    seen = []
    account.reset_peak()
    for name, module in net.named_modules():
        if name.endswith("fc"):
            module.register_forward_hook(lambda *_: seen.append(account.resident_bytes))
    use(strategy, net)
    net(torch.ones(2, 8))
    strategy.finish_use(net)
    assert len(seen) == 6
    assert all(outside + block <= bytes_then <= outside + 2 * block for bytes_then in seen)
    assert account.peak_bytes == outside + 2 * block or (not at_once and account.peak_bytes == outside + block)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in net.blocks)


@pytest.mark.parametrize("kind", OFFLOADING)
def test_an_offloaded_component_fails_loudly_instead_of_computing_with_nothing(kind):
    net = Net()
    hold(kind, net)
    with pytest.raises(RuntimeError):
        net(torch.ones(2, 8))


@pytest.mark.parametrize("kind", OFFLOADING)
@pytest.mark.parametrize("fails_at", range(6))
def test_a_load_that_fails_leaves_the_weights_where_they_were(kind, fails_at):
    net, place = Net(), FailingPlace()
    weights = clone_weights(net)
    wanted = net(torch.ones(2, 8))
    strategy, account = hold(kind, net, place)
    place.left = fails_at
    failed = False
    try:
        use(strategy, net)
        net(torch.ones(2, 8))
    except MemoryError:
        failed = True
        strategy.give_up(net)
    assert failed
    assert weight_bytes(net) == account.resident_bytes == 0
    place.left = None
    use(strategy, net)
    assert torch.equal(net(torch.ones(2, 8)), wanted)
    strategy.finish_use(net)
    strategy.bring_back(net)
    assert same_weights(net, weights)


@pytest.mark.parametrize("kind", [ComponentOffload, SnapshotOffload])
def test_a_prefetch_that_fails_is_tried_again_by_the_use(kind, caplog):
    net, place = Net(), FailingPlace()
    wanted = net(torch.ones(2, 8))
    strategy, account = hold(kind, net, place)
    place.left = 3
    strategy.prefetch(net, None)
    wait([strategy.piece._pending._future])
    place.left = None
    use(strategy, net)
    assert torch.equal(net(torch.ones(2, 8)), wanted)
    assert "no room" in caplog.text
    strategy.finish_use(net)
    place.left = 3
    strategy.prefetch(net, None)
    with pytest.raises(MemoryError):
        use(strategy, net)
    assert account.resident_bytes == 0
    place.left = None
    use(strategy, net)
    assert torch.equal(net(torch.ones(2, 8)), wanted)


@pytest.mark.parametrize("kind", OFFLOADING)
def test_a_prefetch_counts_while_it_runs_and_is_dropped_where_nobody_comes(kind):
    net = Net()
    strategy, account = hold(kind, net)
    needed = strategy.prefetch_bytes()
    strategy.prefetch(net, None)
    assert needed > 0
    assert strategy.prefetch_bytes() == 0
    strategy.finish_request(net)
    assert account.resident_bytes == weight_bytes(net) == 0
    assert account.peak_bytes >= needed


def test_a_prefetch_runs_beside_the_main_thread():
    net, threads = Net(), set()

    class Place(MemoryPlace):
        def allocate(self, nbytes):
            threads.add(threading.get_ident())
            return super().allocate(nbytes)

    strategy, _ = hold(ComponentOffload, net, Place())
    strategy.prefetch(net, None)
    use(strategy, net)
    assert threads
    assert threading.get_ident() not in threads


def test_component_offload_keeps_what_was_done_to_the_weights_in_any_way():
    net = Net()
    strategy, _ = hold(ComponentOffload, net)
    use(strategy, net)
    net.embed.weight.data.add_(1)  # unseen by autograd
    with torch.no_grad():
        net.head.bias.fill_(3)
    changed = clone_weights(net)
    strategy.finish_use(net)
    use(strategy, net)
    assert same_weights(net, changed)


@pytest.mark.parametrize("kind", [SnapshotOffload, LayerwiseOffload])
def test_snapshots_keep_what_autograd_noticed_and_updates(kind):
    net = Net()
    strategy, _ = hold(kind, net)
    use(strategy, net)
    with torch.no_grad():
        net.head.bias.fill_(3)
    strategy.finish_use(net)
    strategy.update(net, lambda part: [p.data.mul_(2) for p in part.parameters()], False)
    assert weight_bytes(net) == 0
    strategy.bring_back(net)
    assert torch.equal(net.head.bias, torch.full((8,), 6.0))
    assert torch.equal(net.blocks[1].fc.weight, 2 * Net().blocks[1].fc.weight)


@pytest.mark.parametrize("kind", EVERY)
def test_another_dtype_for_a_use_costs_no_bits(kind):
    net = Net()
    weights = clone_weights(net)
    net.register_buffer("count", torch.tensor([1, 2, 3]))
    strategy, account = hold(kind, net)
    for dtype in (torch.bfloat16, None, torch.float16, torch.bfloat16, torch.float32):
        use(strategy, net, dtype)
        assert net.embed.weight.dtype == (dtype or torch.float32)
        assert net.count.dtype == torch.int64
        net(torch.ones(2, 8, dtype=dtype))
        strategy.finish_request(net)
        assert account.resident_bytes == weight_bytes(net)
        strategy.finish_use(net)
    strategy.bring_back(net)
    assert same_weights(net, {**weights, "count": torch.tensor([1, 2, 3])})


@pytest.mark.parametrize("kind", OFFLOADING)
def test_tied_and_overlapping_weights_stay_tied(kind):
    net: Any = Net()
    net.head.weight = net.embed.weight
    net.blocks[1].fc.weight = net.blocks[0].fc.weight
    flat = torch.randn(16)
    net.register_buffer("low", flat[:8])
    net.blocks[2].register_buffer("high", flat[8:])
    weights, total = clone_weights(net), weight_bytes(net)
    strategy, account = hold(kind, net)
    for _ in range(2):
        assert account.resident_bytes == weight_bytes(net) == 0
        use(strategy, net)
        net(torch.ones(2, 8))
        assert net.low.untyped_storage().data_ptr() == net.blocks[2].high.untyped_storage().data_ptr()
        strategy.finish_use(net)
    strategy.bring_back(net)
    assert same_weights(net, weights)
    assert net.head.weight is net.embed.weight
    assert account.resident_bytes == weight_bytes(net) == total


@pytest.mark.parametrize("kind", OFFLOADING)
def test_a_view_put_in_later_is_tied_to_what_it_looks_into(kind):
    net: Any = Net()
    strategy, account = hold(kind, net)
    strategy.bring_back(net)
    total = weight_bytes(net)
    net.register_buffer("row", net.embed.weight.detach()[0])
    strategy.refresh(net)
    assert account.resident_bytes == weight_bytes(net) == total
    strategy.finish_use(net)
    assert account.resident_bytes == weight_bytes(net) == 0
    strategy.bring_back(net)
    assert net.row.data_ptr() == net.embed.weight.data_ptr()
    assert torch.equal(net.row, Net().embed.weight[0])


@pytest.mark.parametrize("kind", OFFLOADING)
def test_replaced_parts_are_picked_up(kind):
    net = Net()
    strategy, account = hold(kind, net)
    net.blocks[1] = Net(seed=1).blocks[1]
    net.head.weight = nn.Parameter(torch.ones(8, 8))
    use(strategy, net)
    got = net(torch.ones(2, 8))
    strategy.finish_use(net)
    assert account.resident_bytes == weight_bytes(net) == 0
    other = Net()
    other.blocks[1] = Net(seed=1).blocks[1]
    other.head.weight = nn.Parameter(torch.ones(8, 8))
    assert torch.equal(got, other(torch.ones(2, 8)))


@pytest.mark.parametrize("kind", EVERY)
def test_data_given_to_a_parameter_while_it_was_away_is_what_counts(kind):
    net = Net()
    strategy, account = hold(kind, net)
    net.head.weight.data = torch.ones(8, 8)
    use(strategy, net)
    assert torch.equal(net.head.weight, torch.ones(8, 8))
    strategy.finish_use(net)
    strategy.bring_back(net)
    assert torch.equal(net.head.weight, torch.ones(8, 8))
    assert account.resident_bytes == weight_bytes(net)


def test_blocks_are_the_outermost_lists_of_several_weighted_modules():
    net = Net(depth=2)
    net.extra = nn.Sequential(nn.SiLU(), nn.Linear(2, 2))
    net.more = nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert [name for name, _ in find_blocks(net)] == ["blocks.0", "blocks.1", "more.0", "more.2"]
    assert [name for name, _ in find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))] == ["0", "1"]
    assert find_blocks(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("kind", OFFLOADING)
def test_a_component_without_blocks_or_weights(kind):
    for net in (nn.Linear(3, 3), nn.GELU()):
        strategy, account = hold(kind, net)
        use(strategy, net)
        net(torch.ones(1, 3))
        strategy.finish_use(net)
        assert account.resident_bytes == 0


@given(
    st.lists(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64]),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_any_dtype_shape_and_stride_survives(dtypes, data):
    net = nn.Module()
    for index, dtype in enumerate(dtypes):
        size = data.draw(st.lists(st.integers(0, 4), max_size=3))
        made = (torch.randn(size) * 100).to(dtype)
        if made.dim() > 1 and data.draw(st.booleans()):
            made = made.transpose(0, 1)
        net.register_buffer(f"b{index}", made[1:] if made.dim() and data.draw(st.booleans()) else made)
    before = {n: (b.clone(), b.stride()) for n, b in net.named_buffers()}
    strategy, account = hold(SnapshotOffload, net)
    assert weight_bytes(net) == account.resident_bytes == 0
    use(strategy, net)
    for name, found in net.named_buffers():
        assert torch.equal(found, before[name][0])
        assert found.stride() == before[name][1] or found.numel() == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OutputError, match="residency_dir"):
        FileSlot(64, str(tmp_path / "missing"))


def test_nothing_is_left_in_the_folder(tmp_path):
    strategy, _ = hold(ComponentOffload, Net(), MemoryPlace(str(tmp_path)))
    assert strategy.piece.kept
    assert os.listdir(tmp_path) == []


def test_the_memory_is_really_given_back():
    """In a process of its own: its anonymous and its file-backed memory as the kernel counts them."""
    script = """
        import torch
        from torch import nn
        from fxnvtx.pipeline.memory import ByteAccount
        from fxnvtx.pipeline.memory import ResidencyRanges
        from fxnvtx.pipeline.memory import MemoryPlace
        from fxnvtx.pipeline.strategies import ComponentOffload

        def resident():
            rows = dict(line.split(":") for line in open("/proc/self/status"))
            return (int(rows["RssAnon"].split()[0]) + int(rows["RssFile"].split()[0])) / 1024

        empty = resident()
        net = nn.Linear(8192, 8192, bias=False)  # 256 MiB
        full = resident()
        strategy = ComponentOffload("net", MemoryPlace(), ByteAccount(), ResidencyRanges())
        strategy.refresh(net)
        strategy.finish_use(net)
        away = resident()
        strategy.before_use(net, None)
        strategy.wait_for_use(net, None)
        back = resident()
        strategy.finish_use(net)
        print(full - empty, away - empty, back - empty, resident() - empty)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=CHILD_S, check=True
    )
    full, away, back, again = map(float, done.stdout.split())
    assert full > 250
    assert back > 250
    assert away < 40
    assert again < 40
