"""Any order of begin, end, nest, fail, replace, toggle and refresh: ranges balanced, bytes exact, no trace left."""

import gc
import weakref

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from fxnvtx import ranges
from fxnvtx.modules import is_enabled, label_of
from fxnvtx.pipeline import ComponentResidencyManager, ComponentUse
from fxnvtx.pipeline.memory import MemoryPlace
from fxnvtx.recording import Recording

from .nets import LAYERS, Net, Uses, same_weights, weight_bytes

NAMES = ("a", "b", "c")
MODES = ("resident", "component-offload", "layerwise-offload", "snapshot-offload")
PHASES = (None, "again")
X = torch.ones(1, 4)


class Place(MemoryPlace):
    """Fails the n-th allocation from when it is told to."""

    countdown = None

    def allocate(self, nbytes):
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                raise MemoryError("no room")
        return super().allocate(nbytes)


class Interrupted(BaseException):
    pass


class ManagerMachine(RuleBasedStateMachine):
    @initialize(modes=st.tuples(*[st.sampled_from(MODES)] * 3), speed=st.booleans())
    def start(self, modes, speed):
        self.seed = 0
        self.place = Place()
        self.components = {name: self.new() for name in NAMES}
        self.likes = {name: self.like(self.components[name]) for name in NAMES}
        self.modes = dict(zip(NAMES, modes, strict=True))
        self.args = LAYERS.with_values(residency=self.modes, performance_mode="speed" if speed else "auto")
        self.manager = ComponentResidencyManager(self.components, args=self.args, place=self.place)
        self.stage = Uses(None, *(ComponentUse(n, p) for n in NAMES for p in PHASES))
        self.stage.set_registered_stage_name("s")
        self.blocks = []  # use_component blocks that are open: (context manager, name, module)
        self.linear = None  # (name, phase, module) that begin_use began, at the present depth
        self.removed = set()
        self.gone = []
        self.recording = Recording()
        ranges.add_sink(self.recording)

    def new(self):
        self.seed += 1
        return Net(width=4, depth=2, seed=self.seed)

    def like(self, net):
        made = Net(width=4, depth=2)
        made.load_state_dict(net.state_dict())
        return made

    def teardown(self):
        if not hasattr(self, "recording"):
            return
        self.place.countdown = None
        while self.blocks:
            self.leave_block()
        if self.manager.in_request:
            self.finish()
        assert all(net is None or not is_enabled(net) or label_of(net) is None for net in self.components.values())
        for name, net in self.components.items():
            self.manager.bring_back(name)
            assert same_weights(net, dict(self.likes[name].named_parameters()) | dict(self.likes[name].named_buffers()))
            self.manager.remove_nvtx_hooks_for_module(net)
            for module, plain in zip(net.modules(), self.likes[name].modules(), strict=True):
                assert module.__dict__.keys() == plain.__dict__.keys()
                assert not module._forward_hooks
                assert not module._forward_pre_hooks
        ranges.remove_sink(self.recording)
        self.recording.stop()
        assert self.recording.balanced
        assert ranges.local.stack == []

    def in_request(self):
        return self.manager.in_request

    # -------------------------------------------------------------------------------------------------- the rules

    @precondition(lambda self: not self.in_request())
    @rule(warmup=st.booleans())
    def begin(self, warmup):
        self.warmup = warmup
        self.manager.begin_request([self.stage], self.args, is_warmup=warmup)
        self.manager.before_stage(self.stage)
        self.linear = None

    @precondition(lambda self: self.in_request() and not self.blocks)
    @rule()
    def finish(self):
        self.manager.finish_request()
        self.linear = None
        self.removed.clear()

    @precondition(lambda self: self.in_request())
    @rule(name=st.sampled_from(NAMES), phase=st.sampled_from(PHASES))
    def begin_use(self, name, phase):
        module = self.manager.begin_use(name, phase)
        assert module is self.components[name]
        if self.linear != (name, phase, module):
            self.removed.discard(id(module))
        self.linear = (name, phase, module)
        self.check_call(name, phase, module)

    @precondition(lambda self: self.in_request())
    @rule(name=st.sampled_from(NAMES), phase=st.sampled_from(PHASES))
    def end_use(self, name, phase):
        self.manager.end_use(name, phase)
        if self.linear is not None and self.linear[:2] == (name, phase):
            self.linear = None

    @precondition(lambda self: self.in_request() and len(self.blocks) < 3)
    @rule(name=st.sampled_from(NAMES), phase=st.sampled_from(PHASES))
    def enter_block(self, name, phase):
        block = self.manager.use_component(name, phase)
        module = block.__enter__()
        self.removed.discard(id(module))
        self.blocks.append((block, self.linear, name, module))
        self.linear = None
        self.check_call(name, phase, module)

    @precondition(lambda self: self.blocks)
    @rule()
    def leave_block(self):
        block, self.linear, _, _ = self.blocks.pop()
        block.__exit__(None, None, None)

    @precondition(lambda self: self.blocks)
    @rule()
    def leave_block_with_an_error(self):
        block, self.linear, _, _ = self.blocks.pop()
        error = Interrupted()
        try:
            block.__exit__(Interrupted, error, None)
        except Interrupted:
            pass

    @precondition(lambda self: self.in_request())
    @rule(name=st.sampled_from(NAMES), after=st.integers(0, 5))
    def a_load_fails(self, name, after):
        open_before = len(ranges.local.stack)
        self.place.countdown = after
        try:
            with self.manager.use_component(name) as net:
                net(X)
        except MemoryError:
            pass
        finally:
            self.place.countdown = None
        assert len(ranges.local.stack) == open_before

    @precondition(lambda self: self.in_request())
    @rule(name=st.sampled_from(NAMES))
    def a_call_fails(self, name):
        def stop(*_):
            raise Interrupted

        with self.manager.use_component(name) as net:
            handle = net.blocks[1].register_forward_pre_hook(stop)  # type: ignore[index,union-attr]
            try:
                net(X)
                raise AssertionError("not reached")
            except Interrupted:
                pass
            finally:
                handle.remove()

    @rule(name=st.sampled_from(NAMES))
    def replace(self, name):
        old = self.components[name]
        used = [module for *_, module in self.blocks] + [saved[2] for _, saved, *_ in self.blocks if saved]
        held = any(module is old for module in used) or (self.linear and self.linear[2] is old)
        self.components[name] = self.new()
        self.likes[name] = self.like(self.components[name])
        if not held:
            self.gone.append(weakref.ref(old))

    @precondition(lambda self: not self.blocks and self.linear is None)
    @rule(name=st.sampled_from(NAMES))
    def replace_a_child(self, name):
        net, like = self.components[name], self.likes[name]
        fresh = self.new()
        net.head = nn.Sequential(fresh.head, nn.Identity())
        like.head = nn.Sequential(self.like_linear(fresh.head), nn.Identity())

    def like_linear(self, linear):
        made = nn.Linear(4, 4)
        made.load_state_dict(linear.state_dict())
        return made

    @precondition(lambda self: self.in_request())
    @rule(step=st.booleans())
    def toggle(self, step):
        self.manager.show_layers(step)
        self.manager.show_layers(True)

    @rule()
    def refresh(self):
        self.manager.refresh_pipeline()

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        net = self.components[name]
        self.manager.remove_nvtx_hooks_for_module(net)
        assert all(label_of(module) is None for module in net.modules())
        self.removed.add(id(net))

    @rule(name=st.sampled_from(NAMES))
    def update(self, name):
        def negate(part):
            for p in part.parameters():
                p.data.neg_()

        self.manager.update_component(name, negate)
        with torch.no_grad():
            negate(self.likes[name])

    # --------------------------------------------------------------------------------------------- what must hold

    def check_call(self, name, phase, module):
        """A component in use computes with its own weights, under the name of its use."""
        before = len(self.recording.ranges)
        got = module(X)
        assert torch.equal(got, self.likes[name](X)) if module is self.components[name] else True
        seen = [r.label for r in self.recording.ranges[before:] if r.category == "module"]
        prefix = ".".join(filter(None, ("s", name, phase)))
        if self.warmup or id(module) in self.removed:
            assert seen == [] or self.warmup is False
        else:
            assert seen[0] == prefix
            assert all(text.startswith(prefix) for text in seen)

    @invariant()
    def what_is_in_memory_is_declared_and_counted(self):
        if not hasattr(self, "manager"):
            return
        manager = self.manager
        in_use = {id(m) for *_, m in self.blocks} | ({id(self.linear[2])} if self.linear else set())
        for block in self.blocks:
            if block[1]:
                in_use.add(id(block[1][2]))
        for net in self.components.values():
            strategy = manager.holdings.of(net)
            if strategy is None:
                continue  # new, the manager has not met it
            assert weight_bytes(net) <= strategy.committed_bytes + self.new_bytes(net, strategy)
            if strategy.offloads and id(net) not in in_use and not any(p.pending for p in strategy.pieces()):
                # children put in by hand, and not yet brought away, may be there
                fresh = sum(s.held for p in strategy.pieces() for s in p.stored if s.slot is None)
                assert strategy.committed_bytes == fresh

    def new_bytes(self, net, strategy):
        """Bytes of children that were put in since the manager looked."""
        known = {id(t) for p in strategy.pieces() for s in p.stored for t, _ in s.alive()}
        return sum(t.nbytes for t in (*net.parameters(), *net.buffers()) if id(t) not in known)

    @invariant()
    def replaced_components_are_freed(self):
        if hasattr(self, "gone") and self.gone:
            if any(ref() is not None for ref in self.gone):
                gc.collect()  # slow, and rarely needed: an exception's traceback may hold one for a while
            assert all(ref() is None for ref in self.gone)
            self.gone.clear()


ManagerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)
TestManager = ManagerMachine.TestCase
