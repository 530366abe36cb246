"""Weights between pinned host memory and a GPU: bit for bit, counted as CUDA counts, on a stream of their own."""

import pytest
import torch

import fxnvtx
from fxnvtx.models import build, generate
from fxnvtx.pipeline import Batch, ServerArgs, pipelines
from fxnvtx.pipeline.args import RESIDENCY_MODES
from fxnvtx.pipeline.memory import ByteAccount, CudaPlace, PinnedSlot, ResidencyRanges, default_place
from fxnvtx.pipeline.strategies import ComponentOffload, LayerwiseOffload, SnapshotOffload

from ..pipeline.nets import LAYERS, Net, clone_weights, labels, same_weights
from .device import needs_device

pytestmark = [pytest.mark.gpu, needs_device]
NAMES = ("text_encoder", "dit", "vae")


def image_with(mode, args=LAYERS):
    pipeline = pipelines.build_reference(args.with_values(residency=dict.fromkeys(NAMES, mode)))
    image = pipeline(Batch(prompt="a fox", steps=2)).image
    return pipeline, image


@pytest.mark.parametrize("mode", RESIDENCY_MODES)
def test_the_image_is_the_same_to_the_bit_in_every_mode(mode):
    pipeline, image = image_with(mode)
    assert torch.equal(image, image_with("resident")[1])
    account = pipeline.residency.account
    assert account.peak_bytes <= pipeline.residency.bound_bytes
    assert (account.resident_bytes == 0) is (mode != "resident")


def test_the_image_is_the_one_without_a_runtime():
    plain = generate("a fox", 2, 0, models=build().to("cuda"))
    assert torch.equal(image_with("resident")[1], plain)


@pytest.mark.parametrize("kind", [ComponentOffload, SnapshotOffload, LayerwiseOffload])
def test_device_memory_falls_by_what_is_counted(kind):
    net = Net(width=512, depth=4).cuda()
    weights, wanted = clone_weights(net), net(torch.ones(1, 512, device="cuda"))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    account = ByteAccount()
    strategy = kind("net", CudaPlace(torch.device("cuda", 0)), account, ResidencyRanges())
    strategy.refresh(net)
    total = account.resident_bytes
    strategy.finish_use(net)
    torch.cuda.synchronize()
    # the allocator rounds each block up to 512 bytes
    assert total <= before - torch.cuda.memory_allocated() <= total + 512 * len(weights)
    for _ in range(3):
        strategy.refresh(net)
        strategy.prefetch(net, None)
        strategy.before_use(net, None)
        strategy.wait_for_use(net, None)
        assert torch.equal(net(torch.ones(1, 512, device="cuda")), wanted)
        strategy.finish_use(net)
    strategy.bring_back(net)
    assert same_weights(net, weights)


def test_host_copies_are_pinned_and_prefetches_run_on_another_stream():
    place = default_place()
    assert isinstance(place, CudaPlace)
    slot = place.slot(64)
    assert isinstance(slot, PinnedSlot)
    assert slot._bytes.is_pinned()
    streams = []

    def move():
        streams.append(torch.cuda.current_stream())
        return [place.allocate(16)]

    (made,) = place.start(move).wait()
    assert made.is_cuda
    assert streams[0] != torch.cuda.current_stream()


def test_residency_ranges_enclose_the_copies():
    args = LAYERS.with_values(residency=dict.fromkeys(NAMES, "component-offload"))
    with fxnvtx.record() as recording:
        pipelines.build_reference(args)(Batch(prompt="a fox", steps=1))
    assert recording.balanced
    assert {"residency.load text_encoder", "residency.offload vae"} <= set(labels(recording))


def test_the_device_profiler_can_be_started_and_stopped():
    pipeline = pipelines.build_reference(ServerArgs(cuda_profiler_range=True))
    assert pipeline(Batch(prompt="a fox", steps=1)).image is not None
