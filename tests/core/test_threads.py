"""Every thread has its own stack, and a forked child starts with an empty one."""

from __future__ import annotations

import os
import threading

import fxnvtx
from fxnvtx.ranges import local

from .tools import in_process, shape


def test_eight_threads_nest_independently():
    barrier = threading.Barrier(8)
    stacks = []

    def work(name):
        barrier.wait()
        for turn in range(200):
            with fxnvtx.range(name), fxnvtx.range(f"{name} {turn % 2}"):
                pass
        stacks.append(list(local.stack))

    with fxnvtx.record() as recording:
        threads = [threading.Thread(target=work, args=(f"t{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert stacks == [[]] * 8
    assert recording.balanced
    by_thread: dict[int, list] = {}
    for item in recording.ranges:
        by_thread.setdefault(item.thread_id, []).append(item.label)
    assert len(by_thread) == 8
    for seen in by_thread.values():
        assert seen == [f"{seen[0]}{end}" for turn in range(200) for end in ("", f" {turn % 2}")]
    roots = shape(recording.tree())
    assert len(roots) == 1600
    assert all(len(children) == 1 and children[0][0].startswith(name) for name, children in roots)


def test_a_forked_child_starts_with_an_empty_stack_and_the_parent_keeps_its_own():
    done = in_process(
        """
        import os, fxnvtx
        from fxnvtx.ranges import local
        with fxnvtx.record() as recording:
            with fxnvtx.range("parent"):
                child = os.fork()
                if child == 0:
                    assert local.stack == []
                    with fxnvtx.range("child"):
                        assert [e.text for e in local.stack.labels] == ["child"]
                    assert local.stack == []
                    code = 0
                else:
                    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                    assert [e.text for e in local.stack.labels] == ["parent"]
            assert local.stack == []  # the child leaves the parent's range without popping anything
        if child == 0:
            os._exit(0)
        assert code == 0
        assert [(r.label, r.end_ns is not None) for r in recording.ranges] == [("parent", True)]
        print("fine")
        """
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_a_fork_while_another_thread_instruments_does_not_lock_the_child_up():
    done = in_process(
        """
        import os, threading, fxnvtx
        from torch import nn
        from fxnvtx.modules import registry as control
        from fxnvtx.ranges import emit
        held, release = threading.Event(), threading.Event()
        def hold():
            with control.lock, emit.listener_lock:
                held.set()
                release.wait(20)
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(20)
        threading.Timer(0.2, release.set).start()
        child = os.fork()
        if child == 0:
            import signal
            signal.alarm(20)  # a locked-up child dies of it
            fxnvtx.instrument(nn.Linear(1, 1))
            with fxnvtx.record():
                pass
            os._exit(0)
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print("fine")
        """
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_pids_are_told(tmp_path):
    with fxnvtx.record() as recording:
        pass
    assert recording.meta["pid"] == os.getpid()
