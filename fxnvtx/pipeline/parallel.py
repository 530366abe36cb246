"""ParallelExecutor: one pipeline on several ranks of torch.distributed.

What the ranks of a parallel executor say to one another, in a way that a failure on one is heard by all.

Every exchange begins with one small all-gather: what each rank is about to do, or that it failed. Ranks that are about
to send and ranks that have failed meet in that same call, so nobody waits for one who will not come, and after a
failure all ranks are at the same point and the next request works.
"""

from __future__ import annotations

import ctypes
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ranges
from ..errors import PipelineError
from ..ranges import emit, label, range
from .args import ServerArgs
from .executor import PipelineExecutor, PipelineStage, StageParallelism
from .request import RequestMetrics, running, running_with

if TYPE_CHECKING:
    from .executor import ComposedPipeline

__all__ = ["Group", "ParallelExecutor"]


# ------------------------------------------------------------------------------------------------------------ the ranks


T = TypeVar("T")
OPERATIONS = ("agree", "barrier", "broadcast", "broadcast_cfg", "gather_cfg", "error")


class Group:
    """The ranks of one executor. Needs torch.distributed to be initialised (gloo, or nccl for data on GPUs).

    `cfg_size`: so many neighbouring ranks share the passes of guidance; all of them where it is None. `timeout_s`: how
    long to wait for a rank that says nothing at all.
    """

    def __init__(self, cfg_size: int | None = None, timeout_s: float = 600.0) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise PipelineError(
                "a parallel executor needs torch.distributed: call init_process_group('gloo'), or use SyncExecutor"
            )
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.cfg_size = self.size if cfg_size is None else cfg_size
        if self.cfg_size < 1 or self.size % self.cfg_size:
            raise PipelineError(f"cfg_size={cfg_size} does not divide the number of ranks, {self.size}")
        self.cfg_rank = self.rank % self.cfg_size
        self._raised: BaseException | None = None  # what an exchange raised on every rank since `together` began
        self._timeout = timedelta(seconds=timeout_s)
        # apart from anybody else's traffic; control messages are small and on the CPU whatever the data's backend is
        self._control: Any = self._guarded(lambda: dist.new_group(backend="gloo", timeout=self._timeout))
        self._cfg: Any = None
        for first in _counted(0, self.size, self.cfg_size):
            members = list(_counted(first, first + self.cfg_size, 1))
            made = self._guarded(functools.partial(dist.new_group, members, timeout=self._timeout))
            if self.rank in members:
                self._cfg = made

    # ------------------------------------------------------------------------------------------------- exchanges

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on this rank; where it fails on any rank, every rank raises what the first of them raised."""
        self._raised = None
        try:
            result = work()
        except BaseException as error:
            if self._raised is not None:  # it came out of an exchange inside `work`: everybody knows
                raise
            self.fail(error)
        if self._raised is not None:  # `work` made nothing of it, but the other ranks are not where it believes
            raise self._raised
        self._meet("agree")
        return result

    def fail(self, error: BaseException) -> NoReturn:
        """Tell every rank of a failure on this one, and raise what all of them raise."""
        self._meet("error", error=error)
        raise AssertionError("an exchange in which a rank failed always raises") from error

    def barrier(self) -> None:
        """Wait for every rank."""
        with self._range("barrier"):
            self._meet("barrier")

    def broadcast(self, value: T | None, operation: str = "broadcast") -> T:
        """Rank 0's `value` (anything that pickles) on every rank."""
        with self._range(operation):
            data = b""
            if self.rank == 0:
                data = self._pickled(value, operation)
            sizes = self._meet(operation, size=len(data))
            buffer = _buffer(data, sizes[0])
            self._guarded(lambda: dist.broadcast(buffer, group=self._control, group_src=0))
            try:
                found: Any = value if self.rank == 0 else _unpacked(buffer)
            except BaseException as error:  # a class that this rank does not have
                self.fail(error)
            self._meet("agree")
            return cast(T, found)

    def gather_cfg(self, mine: Tensor) -> list[Tensor]:
        """The tensors of the ranks that share the guidance passes, in the order of their ranks."""
        with self._range("gather_cfg"):
            self._meet("gather_cfg")
            mine = mine.contiguous()
            parts = [torch.empty_like(mine) for _ in _counted(0, self.cfg_size, 1)]
            self._guarded(lambda: dist.all_gather(parts, mine, group=self._cfg))
            return parts

    # --------------------------------------------------------------------------------------------------- details

    def _range(self, what: str) -> range:
        enabled = running().use_nvtx is True
        return range(label(what, "op"), payload=self.rank, enabled=enabled)

    def _pickled(self, value: object, operation: str) -> bytes:
        file = io.BytesIO()
        try:
            torch.save(value, file)
            return file.getvalue()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = PipelineError(f"rank 0 cannot {operation} a {type(value).__name__}: it does not pickle ({reason})")
            what.__cause__ = error
            self.fail(what)

    def _meet(self, operation: str, *, size: int = 0, error: BaseException | None = None) -> list[int]:
        """One all-gather of (operation, size). Returns everybody's sizes; raises where anybody failed."""
        data = b"" if error is None else portable(error)
        mine = torch.tensor([OPERATIONS.index(operation), len(data) or size], dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in _counted(0, self.size, 1)]
        self._guarded(lambda: dist.all_gather(found, mine, group=self._control))
        operations = [OPERATIONS[int(row[0])] for row in found]
        if "error" in operations:
            self._raise_everywhere(operations.index("error"), [int(row[1]) for row in found], data, error)
        if len(set(operations)) > 1:
            listed = ", ".join(operations)
            raise self._note(
                PipelineError(f"the ranks do different things ({listed}): give all of them the same pipeline")
            )
        return [int(row[1]) for row in found]

    def _raise_everywhere(self, source: int, sizes: list[int], data: bytes, mine: BaseException | None) -> None:
        """All ranks raise what the first failed rank raised."""
        own = self.rank == source
        buffer = _buffer(data if own else b"", sizes[source])
        self._guarded(lambda: dist.broadcast(buffer, group=self._control, group_src=source))
        error: BaseException = pickle.loads(_bytes(buffer))
        if own and mine is not None and same(error, mine):
            raise self._note(mine)
        raise self._note(error) from mine

    def _note(self, error: BaseException) -> BaseException:
        self._raised = error
        return error

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except RuntimeError as error:
            raise self._note(
                PipelineError(f"rank {self.rank} lost the others ({str(error).splitlines()[0]}): start all ranks again")
            ) from error


def portable(error: BaseException) -> bytes:
    """An exception for the other ranks: itself where it survives pickling, else a PipelineError with type and text."""
    try:
        data = pickle.dumps(error)
        if same(pickle.loads(data), error):
            return data
    except Exception:  # an exception class may refuse in any way
        pass
    return pickle.dumps(PipelineError(f"{type(error).__name__}: {error}"))


def same(one: BaseException, other: BaseException) -> bool:
    return type(one) is type(other) and str(one) == str(other)


def _unpacked(buffer: Tensor) -> Any:
    return torch.load(io.BytesIO(_bytes(buffer)), map_location=_to_this_rank, weights_only=False)


def _to_this_rank(storage: Any, location: str) -> Any:
    """Tensors that lay on rank 0's GPU go to this rank's own."""
    return storage if location == "cpu" else storage.cuda()


def _buffer(data: bytes, size: int) -> Tensor:
    """Bytes to send, or room for as many to come."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(size, dtype=torch.uint8)


def _bytes(buffer: Tensor) -> bytes:
    return ctypes.string_at(buffer.data_ptr(), buffer.numel())  # numpy is none of the dependencies


_counted = __builtins__["range"] if isinstance(__builtins__, dict) else __builtins__.range


# --------------------------------------------------------------------------------------------------------- the executor


class ParallelExecutor(PipelineExecutor):
    """Every rank calls `execute` with its copy of the request; each stage says which ranks run it.

    A stage that fails on any rank raises the same error on every rank. All ranges of a rank lie in one called
    `rank_<n>`, and recordings that are running get the rank into their `meta`.
    """

    def __init__(self, group: Group | None = None) -> None:
        super().__init__()
        self.group = group or Group()

    def _execute(self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs) -> Any:
        rank = self.group.rank
        for sink in emit.sinks:
            meta = getattr(sink, "meta", None)
            if isinstance(meta, dict):
                meta["rank"] = rank
        use_nvtx = self._should_use_stage_nvtx(payload, args)
        with (
            ranges.range(label(f"rank_{rank}", "op"), payload=rank, enabled=use_nvtx),
            running_with(group=self.group),
        ):
            return super()._execute(pipeline, payload, args)

    @contextmanager
    def _component_residency_request(
        self, pipeline: ComposedPipeline, payload: Any, args: ServerArgs, use_nvtx: bool
    ) -> Iterator[None]:
        request: AbstractContextManager[None] = super()._component_residency_request(pipeline, payload, args, use_nvtx)
        with ExitStack() as stack:
            self.group.together(lambda: stack.enter_context(request))
            yield

    def _run_stage(self, pipeline: ComposedPipeline, stage: PipelineStage, payload: Any, args: ServerArgs) -> Any:
        group, kind = self.group, stage.parallelism_for(payload)

        def work() -> Any:
            return PipelineExecutor._run_stage(self, pipeline, stage, payload, args)

        if kind is StageParallelism.REPLICATED:
            return group.together(work)
        if kind is StageParallelism.CFG_PARALLEL:
            payload = _received(group.broadcast(payload, "broadcast_cfg"), payload)
            return group.together(work)
        if group.rank == 0:
            # a failure is announced in the same call in which the others wait
            payload = self._main(work)
        if kind is StageParallelism.MAIN_RANK_ONLY:
            group.barrier()
            return payload
        return _received(group.broadcast(payload), payload)

    def _main(self, work: Any) -> Any:
        try:
            return work()
        except BaseException as error:
            self.group.fail(error)
            raise

    def _stage_payload(self) -> int | None:
        return self.group.rank


def _received(new: Any, old: Any) -> Any:
    """A batch that came from rank 0, with this rank's own figures."""
    if new is old:
        return new
    pairs = zip(new, old, strict=True) if isinstance(new, list) else [(new, old)]
    for fresh, known in pairs:
        metrics = getattr(known, "metrics", None)
        if isinstance(metrics, RequestMetrics):
            fresh.metrics = metrics
    return new
