"""Do programs of warps, copies and matrix instructions that meet at mbarriers end, and does nobody read what was overwritten?

Decides: for given programs (one list of `Action` per warp role), whether they deadlock, whether a phase of a barrier is mistaken
for another (a parity bit names every second phase), whether bytes expected are bytes copied, and whether a buffer is written
before its last reader is done or read before its writer is. Refuses: timing, and everything inside one instruction.

How one run speaks for all schedules. Roles are fixed sequences without branches; copies and the tensor core run beside them.
`run` with `clocks=True` carries a vector clock with every event and demands, by happens-before and not by the order in which this
run took the events:
  1. an arrival or a copied byte that belongs to phase p of a barrier comes after the completion of phase p - 1,
  2. the waits of a role on a barrier are for consecutive phases, so that one for phase p begins after the completion of phase
     p - 1, and phase p + 1 completes after the wait for phase p has passed,
  3. accesses to one buffer of which at least one writes are ordered, and each access finds what the program says it should,
  4. an arrival at a barrier comes before the end of the CTA that the barrier lies in (names end in @CTA),
  5. no event of a tile comes after one of a later tile (`mark`): a run of 200 tiles begins with the runs of 1 to 199.
From 1 and 2 follows, by induction over events, that every wait in every schedule is for the phase meant: it can pass only on that
phase's fixed set of arrivals, and once it can pass it stays so. Such a net has no choices: two enabled events do not disable
each other, so all maximal schedules have the same events. One that ends shows that all end; one that is free of the faults of 3
and 4 shows that all are. The adversarial schedules (`order`) are a second witness which takes parity bits and contents at their
word.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from operator import le
from typing import NamedTuple

__all__ = [
    "Action", "Conflict", "Count", "Kind", "Touch", "arrive", "commit", "copy", "drain", "expect", "mark", "mma", "run", "store",
    "use", "wait",
]


class Conflict(Exception):
    """What is wrong with a set of programs: a deadlock, a mistaken phase, a race, bytes that do not add up."""


class Kind(IntEnum):
    """What one step of a role does."""

    WAIT = 0  # mbarrier.try_wait.parity until it succeeds
    ARRIVE = 1  # mbarrier.arrive; with bytes: arrive.expect_tx
    COPY = 2  # a bulk tensor copy into a buffer, asynchronous, that completes bytes on a barrier
    MMA = 3  # a matrix instruction, queued on the tensor core
    COMMIT = 4  # tcgen05.commit: arrivals once everything queued before is done
    USE = 5  # the role itself reads or writes buffers
    STORE = 6  # a bulk store out of a buffer, asynchronous, in a group of its own
    DRAIN = 7  # cp.async.bulk.wait_group.read: at most so many groups of this role still read
    MARK = 8  # no step: here begins the tile of this number


class Touch(NamedTuple):
    """One access: the buffer, what it has to hold (None: anything), what it holds afterwards (None: it is only read)."""

    buffer: str
    before: object
    after: object


class Action(NamedTuple):
    """One step. `barriers`: who is waited on or arrived at; `value`: parity, bytes, or groups left."""

    kind: Kind
    barriers: tuple[str, ...]
    value: int
    touches: tuple[Touch, ...]


Count = Mapping[str, int]
"""Arrivals that complete a phase, by barrier."""


def wait(barrier: str, parity: int) -> Action:
    """Until the phase of this parity is complete; parity 1 passes on a fresh barrier."""
    return Action(Kind.WAIT, (barrier,), parity, ())


def arrive(*barriers: str) -> Action:
    """One arrival at each."""
    return Action(Kind.ARRIVE, barriers, 0, ())


def expect(barrier: str, nbytes: int) -> Action:
    """One arrival that adds `nbytes` to what the phase waits for."""
    return Action(Kind.ARRIVE, (barrier,), nbytes, ())


def copy(barrier: str, nbytes: int, buffer: str, content: object) -> Action:
    """`nbytes` into `buffer`, completed on `barrier`."""
    return Action(Kind.COPY, (barrier,), nbytes, (Touch(buffer, None, content),))


def mma(*touches: Touch) -> Action:
    """A matrix instruction that accesses these buffers from its start to its end."""
    return Action(Kind.MMA, (), 0, touches)


def commit(*barriers: str) -> Action:
    """An arrival at each barrier when the matrix instructions queued so far are done."""
    return Action(Kind.COMMIT, barriers, 0, ())


def use(*touches: Touch) -> Action:
    """Accesses by the role itself, complete when the step is."""
    return Action(Kind.USE, (), 0, touches)


def store(*touches: Touch) -> Action:
    """Reads of buffers by the copy engine."""
    return Action(Kind.STORE, (), 0, touches)


def drain(left: int) -> Action:
    """Until at most `left` stores of this role are still reading."""
    return Action(Kind.DRAIN, (), left, ())


def mark(ordinal: int) -> Action:
    """Here begins a tile, or, with the number after the last, what follows the tiles."""
    return Action(Kind.MARK, (), ordinal, ())


def _home(name: str) -> str:
    """The CTA that a role or a barrier belongs to: what follows the @."""
    return name.rpartition("@")[2]


class _Barrier:
    """State of one mbarrier and, for the clocks, what completed each phase."""

    __slots__ = ("arrived", "bytes", "completed", "count", "joined", "phases", "sources")

    def __init__(self, count: int) -> None:
        self.count, self.arrived, self.bytes, self.completed = count, 0, 0, 0
        self.joined: list[int] | None = None
        self.phases: list[list[int]] = []  # clock of the completion of each phase
        self.sources: dict[str, int] = {}  # arrivals so far by source


class _Buffer:
    """What a buffer holds and who touched it last, as (agent, time)."""

    __slots__ = ("content", "readers", "written")

    def __init__(self) -> None:
        self.content: object = None
        self.written: tuple[int, int] | None = None
        self.readers: list[tuple[int, int]] = []


class _Agent:
    """A role, the tensor core behind a role, or one copy under way."""

    __slots__ = ("clock", "engine", "groups", "head", "index", "name", "open", "queue", "steps", "time", "waits")

    def __init__(self, name: str, index: int, steps: Iterator[Action] | None = None, engine: _Agent | None = None) -> None:
        self.name, self.index, self.steps, self.time = name, index, steps, 0
        self.engine = engine or self  # whose time counts the events of a copy
        self.queue: deque[tuple[Action, list[int]]] = deque()
        self.clock: list[int] = []
        self.groups: list[_Agent] = []
        self.waits: dict[str, int] = {}
        self.open = False  # a matrix instruction has started and not ended
        self.head = None if steps is None else next(steps, None)


class _Machine:
    """Everything of one run."""

    def __init__(self, programs: Mapping[str, Iterable[Action]], counts: Count, clocks: bool) -> None:
        self.barriers = {name: _Barrier(count) for name, count in counts.items()}
        self.buffers: dict[str, _Buffer] = {}
        self.clocks = clocks
        self.roles = [_Agent(name, 2 * i, iter(program)) for i, (name, program) in enumerate(programs.items())]
        self.cores = {role.name: _Agent(f"tensor core of {role.name}", role.index + 1) for role in self.roles}
        self.engines: dict[str, _Agent] = {}
        self.pending = list(self.cores.values())
        self.passed: list[tuple[str, int, int, int, str]] = []  # barrier, phase, agent, time, name
        self.arrivals: list[tuple[str, int, int, str]] = []  # barrier, agent, time, name
        self.marks: dict[int, dict[int, list[int]]] = {}  # tile -> role -> its clock where the tile begins
        self.width = 2 * len(self.roles)

    # clocks ----------------------------------------------------------------------------------------------------------

    def tick(self, agent: _Agent) -> int:
        """Advance the agent's own time by one event."""
        if not self.clocks:
            return 0
        clock = agent.clock
        if len(clock) <= agent.index:
            clock.extend([0] * (agent.index + 1 - len(clock)))
        agent.engine.time += 1
        clock[agent.index] = agent.engine.time
        return agent.engine.time

    @staticmethod
    def join(clock: list[int], other: Sequence[int]) -> None:
        """Pointwise maximum, in place."""
        if len(clock) < len(other):
            clock.extend([0] * (len(other) - len(clock)))
        clock[: len(other)] = map(max, clock, other)

    @staticmethod
    def covers(clock: Sequence[int], agent: int, time: int) -> bool:
        """Whether the event (agent, time) happened before whoever has this clock."""
        return agent < len(clock) and clock[agent] >= time

    # barriers --------------------------------------------------------------------------------------------------------

    def settle(self, name: str, barrier: _Barrier) -> None:
        """Complete the phase if nothing is missing."""
        if barrier.arrived > barrier.count:
            raise Conflict(f"{name}: {barrier.arrived} arrivals in phase {barrier.completed}, which takes {barrier.count}")
        if barrier.arrived == barrier.count and barrier.bytes == 0:
            barrier.completed, barrier.arrived = barrier.completed + 1, 0
            if self.clocks:
                barrier.phases.append(barrier.joined or [])
                barrier.joined = None

    def meet(self, agent: _Agent, name: str, source: str) -> _Barrier:
        """The barrier, after noting that `agent` contributes to its phase. `source`: one contribution per phase each."""
        barrier = self.barriers[name]
        if self.clocks:
            phase = barrier.sources.get(source, 0)
            barrier.sources[source] = phase + 1
            if phase > len(barrier.phases) or (phase and not self.after(agent.clock, barrier.phases[phase - 1])):
                raise Conflict(f"{name}: {source} can contribute to phase {phase} before phase {phase - 1} is complete")
            self.arrivals.append((name, agent.index, self.tick(agent), source))
            if barrier.joined is None:
                barrier.joined = []
            self.join(barrier.joined, agent.clock)
        return barrier

    @staticmethod
    def after(clock: Sequence[int], other: Sequence[int]) -> bool:
        """Whether everything in `other` is known to `clock`."""
        return all(map(le, other, clock)) and not any(other[len(clock):])

    def arrival(self, agent: _Agent, name: str, nbytes: int) -> None:
        barrier = self.meet(agent, name, agent.name)
        barrier.arrived += 1
        barrier.bytes += nbytes
        self.settle(name, barrier)

    # buffers ---------------------------------------------------------------------------------------------------------

    def touch(self, agent: _Agent, touch: Touch, begin: bool, end: bool) -> None:
        """One access; `begin` checks what is found, `end` records what is left. A matrix instruction does both, apart."""
        buffer = self.buffers.get(touch.buffer)
        if buffer is None:
            buffer = self.buffers[touch.buffer] = _Buffer()
        looks = touch.before is not None and (begin or touch.after is None)
        if looks and buffer.content != touch.before:
            raise Conflict(f"{agent.name} reads {touch.buffer}: finds {buffer.content}, expects {touch.before}")
        if self.clocks and begin:
            earlier = [] if buffer.written is None else [buffer.written]
            if touch.after is not None:
                earlier += buffer.readers
            for who, time in earlier:
                if not self.covers(agent.clock, who, time):
                    raise Conflict(f"{agent.name} accesses {touch.buffer} ({touch.before} -> {touch.after}) and is not ordered "
                                   f"after an earlier access; it holds {buffer.content}")
        if end:
            if touch.after is not None:
                buffer.content = touch.after
            if self.clocks:
                event = (agent.index, agent.clock[agent.index])
                if touch.after is None:
                    buffer.readers.append(event)
                else:
                    buffer.written, buffer.readers = event, []

    # steps -----------------------------------------------------------------------------------------------------------

    def role_step(self, role: _Agent) -> bool:
        """The next action of a role; False where it has to wait or is done."""
        action = role.head
        if action is None or role.steps is None:
            return False
        if action.kind is Kind.WAIT:
            if not self.passes(role, action):
                return False
        elif action.kind is Kind.DRAIN:
            older = max(0, len(role.groups) - action.value)
            if any(group.queue for group in role.groups[:older]):
                return False
            for group in role.groups[:older]:
                self.join(role.clock, group.clock)
            role.groups = role.groups[older:]
        elif action.kind is Kind.ARRIVE:
            for name in action.barriers:
                self.arrival(role, name, action.value)
        elif action.kind is Kind.USE:
            self.access(role, action)
        elif action.kind is Kind.MARK:
            self.tick(role)
            self.marks.setdefault(action.value, {})[role.index] = list(role.clock)
        else:
            self.issue(role, action)
        role.head = next(role.steps, None)
        return True

    def passes(self, role: _Agent, action: Action) -> bool:
        """A wait. With clocks the phase meant is counted: the n-th wait of a role on a barrier is for phase n, or n - 1 where
        the first one was for parity 1."""
        name = action.barriers[0]
        barrier = self.barriers[name]
        if self.clocks:
            if name not in role.waits:
                role.waits[name] = -1 if action.value else 0
            phase = role.waits[name]
            if phase % 2 != action.value:
                raise Conflict(f"{role.name} waits on {name} for parity {action.value}, but its next phase there is {phase}")
        if (barrier.completed & 1) == action.value:
            return False
        if self.clocks:
            if phase >= 0:
                self.join(role.clock, barrier.phases[phase])
            self.passed.append((name, phase, role.index, self.tick(role), role.name))
            role.waits[name] = phase + 1
        return True

    def issue(self, role: _Agent, action: Action) -> None:
        """Hand an asynchronous action to the tensor core or to the copy engine."""
        self.tick(role)
        stamp = list(role.clock)
        if action.kind in (Kind.MMA, Kind.COMMIT):
            self.cores[role.name].queue.append((action, stamp))
            return
        # One engine per buffer: its events are in order wherever the accesses to that buffer are.
        key = f"copy into {action.touches[0].buffer}" if action.kind is Kind.COPY else f"store from {action.touches[0].buffer}"
        engine = self.engines.get(key)
        if engine is None:
            engine = self.engines[key] = _Agent(key, self.width)
            self.width += 1
        one = _Agent(f"{key} by {role.name}", engine.index, engine=engine)
        one.queue.append((action, stamp))
        if action.kind is Kind.STORE:
            role.groups.append(one)
        self.pending.append(one)

    def access(self, agent: _Agent, action: Action) -> None:
        """All accesses of one action that is over at once."""
        for touch in action.touches:
            self.touch(agent, touch, True, False)
        self.tick(agent)
        for touch in action.touches:
            self.touch(agent, touch, False, True)

    def async_step(self, agent: _Agent) -> bool:
        """The next event of the tensor core or of a copy; False where there is none."""
        if not agent.queue:
            return False
        action, stamp = agent.queue[0]
        if self.clocks and not agent.open:  # what it knows is what its issuer knew, and for the tensor core its own past
            self.join(agent.clock, stamp)
        if action.kind is Kind.MMA and not agent.open:
            for touch in action.touches:
                self.touch(agent, touch, True, False)
            self.tick(agent)
            agent.open = True
            return True
        if action.kind is Kind.MMA:
            self.tick(agent)
            for touch in action.touches:
                self.touch(agent, touch, False, True)
            agent.open = False
        elif action.kind is Kind.COMMIT:
            for name in action.barriers:
                self.arrival(agent, name, 0)
        else:
            self.access(agent, action)
            if action.kind is Kind.COPY:
                barrier = self.meet(agent, action.barriers[0], agent.name)
                barrier.bytes -= action.value
                self.settle(action.barriers[0], barrier)
        agent.queue.popleft()
        return True

    def finish(self) -> None:
        """What has to hold when nothing moves any more."""
        stuck = [f"{role.name} at {role.head.kind.name} {' '.join(role.head.barriers)}"
                 for role in self.roles if role.head is not None]
        if stuck:
            raise Conflict(f"deadlock: {'; '.join(stuck)}")
        for name, barrier in self.barriers.items():
            if barrier.bytes or barrier.arrived:
                raise Conflict(f"{name} ends with {barrier.arrived} arrivals and {barrier.bytes} bytes open in phase "
                               f"{barrier.completed}")
        for name, phase, agent, time, who in self.passed:
            phases = self.barriers[name].phases
            if phase + 1 < len(phases) and not self.covers(phases[phase + 1], agent, time):
                raise Conflict(f"{name}: phase {phase + 1} can complete before {who} has seen phase {phase}")
        for ordinal, begun in self.marks.items():
            for other, its in begun.items():
                if self.clocks and any(self.covers(clock, other, its[other] + 1) for clock in begun.values()):
                    raise Conflict(f"an event of a tile before {ordinal} waits for one of tile {ordinal} or later")
        ends: dict[str, list[int]] = {}
        for role in self.roles:
            self.join(ends.setdefault(_home(role.name), []), role.clock)
        for name, agent, time, who in self.arrivals:
            if not self.covers(ends[_home(name)], agent, time):
                raise Conflict(f"{name}: its CTA can have ended when {who} arrives")


def run(
    programs: Mapping[str, Iterable[Action]], counts: Count, order: Sequence[str] = (), clocks: bool = False, late: bool = False
) -> int:
    """Run the programs to the end and return the number of events. Raises Conflict.

    `programs`: actions by role. `counts`: arrivals per phase by barrier. `order`: roles by priority; the first that can move
    moves, one step at a time. `late`: copies and matrix instructions move only when no role can, else they move first.
    """
    machine = _Machine(programs, counts, clocks)
    rank = {name: place for place, name in enumerate(order)}
    roles = sorted(machine.roles, key=lambda role: rank.get(role.name, len(rank)))
    events = 0
    while True:
        moved = 0
        if not late:
            moved = _drain_async(machine)
        if not moved:
            for role in roles:
                if machine.role_step(role):
                    moved = 1
                    while not order and machine.role_step(role):
                        moved += 1
                    break
        if not moved and late:
            moved = int(any(machine.async_step(agent) for agent in machine.pending))
            machine.pending = [a for a in machine.pending if a.queue or a.index < 2 * len(machine.roles)]
        if not moved:
            machine.finish()
            return events
        events += moved


def _drain_async(machine: _Machine) -> int:
    """Every event that copies and tensor cores can do now; the number of them."""
    moved, width = 0, 2 * len(machine.roles)
    for agent in machine.pending:
        while machine.async_step(agent):
            moved += 1
    machine.pending = [agent for agent in machine.pending if agent.queue or agent.index < width]
    return moved
