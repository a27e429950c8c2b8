"""The warps of the Blackwell kernel at their barriers: no deadlock, no mistaken phase, no race, in every schedule.

`barrier_model` says why one run with vector clocks speaks for all schedules; `roles` holds the programs, built from the schedule
functions that the kernel traces. First the model is shown to find what is planted in a program, then the programs are run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest

from lowbit.kernels.blackwell_room import schedule
from lowbit.kernels.blackwell_room.barrier_model import (
    Action,
    Conflict,
    Kind,
    Touch,
    arrive,
    commit,
    copy,
    drain,
    expect,
    mark,
    mma,
    run,
    store,
    use,
    wait,
)
from lowbit.kernels.blackwell_room.roles import Place, barrier_counts, cluster_programs
from lowbit.kernels.blackwell_room.schedule import CONFIGS, Config, Tile

PLAIN = tuple(config for config in CONFIGS if config.out == "f16")
SMALL = Config(Tile(128, 32, 1), 1, 1, "f16", True, 3, 2, 2, 2)
PAIR = Config(Tile(256, 32, 2), 2, 1, "f16", True, 3, 2, 2, 1)
"""Narrow tiles: as many barriers as an instance has, fewer columns to store."""

Edit = Callable[[str, list[Action]], Iterable[Action]]


def walk(count: int) -> list[Place]:
    """Cluster tiles that differ in both coordinates."""
    return [(i % 7, i // 7) for i in range(count)]


def simulate(
    config: Config, tiles: int, k: int = 600, r: int = 80, edit: Edit | None = None, rescale: bool = False, **how: object
) -> int:
    programs: dict[str, Iterable[Action]] = dict(cluster_programs(config, walk(tiles), k, r if config.lora else 0, rescale))
    if edit is not None:
        programs = {role: edit(role, list(program)) for role, program in programs.items()}
    return run(programs, barrier_counts(config, rescale), **how)  # type: ignore[arg-type]


# The model finds what is planted -------------------------------------------------------------------------------------


def ring_of_one() -> dict[str, list[Action]]:
    """A producer that copies three times into one buffer and a consumer that multiplies it three times."""
    producer = [step for i in range(3) for step in (
        wait("empty@0", (i + 1) % 2), expect("full@0", 64), copy("full@0", 64, "x@0", i))]
    consumer = [step for i in range(3) for step in (
        wait("full@0", i % 2), mma(Touch("x@0", i, None)), commit("empty@0"))]
    return {"load@0": [*producer, wait("empty@0", 0)], "mma@0": consumer}


COUNTS = {"full@0": 1, "empty@0": 1}


def test_a_right_program_passes() -> None:
    for clocks, late in itertools.product((False, True), repeat=2):
        # 4 waits, 3 expects, 3 issues and 3 ends of copies; 3 waits, 3 + 6 of multiplications, 3 + 3 of commits
        assert run(ring_of_one(), COUNTS, clocks=clocks, late=late) == 31


@pytest.mark.parametrize(("role", "index", "instead", "says"), [
    ("load@0", 3, None, "can contribute to phase 1 before phase 0"),  # does not wait until the buffer is free
    ("load@0", 1, expect("full@0", 96), "deadlock"),  # announces more than is loaded
    ("load@0", 1, expect("full@0", 32), "deadlock"),  # announces less
    ("load@0", 2, copy("full@0", 64, "x@0", 7), "finds 7, expects 0"),
    ("load@0", 9, None, "can have ended when"),  # does not wait for the last release
    ("mma@0", 2, None, "deadlock"),  # never releases
    ("mma@0", 2, commit("empty@0", "empty@0"), "deadlock"),  # releases two rounds at once
    ("mma@0", 3, wait("full@0", 0), "for parity 0, but its next phase there is 1"),
    ("mma@0", 3, None, "for parity 0, but its next phase there is 1"),  # does not wait for the data
    ("mma@0", 2, arrive("empty@0"), "not ordered"),  # releases when the instruction is issued, not when it is done
])
def test_a_planted_fault_is_found(role: str, index: int, instead: Action | None, says: str) -> None:
    programs = ring_of_one()
    programs[role][index : index + 1] = [] if instead is None else [instead]
    with pytest.raises(Conflict, match=says):
        run(programs, COUNTS, clocks=True)


def test_a_phase_that_is_over_before_it_is_seen_is_found() -> None:
    """Two phases of one parity look alike: what waits for the first must have passed before the second completes. In this order
    it has; in another it never would."""
    programs = {"a@0": [arrive("go@0"), arrive("go@0")], "b@0": [wait("go@0", 0)]}
    with pytest.raises(Conflict, match="phase 1 can complete before b@0 has seen phase 0"):
        run(programs, {"go@0": 1}, order=["b@0", "a@0"], clocks=True)
    with pytest.raises(Conflict, match="deadlock: b@0 at WAIT go@0"):
        run(programs, {"go@0": 1}, order=["a@0", "b@0"])


def test_arrivals_that_nobody_awaits_are_found() -> None:
    with pytest.raises(Conflict, match="ends with 1 arrivals and 0 bytes open in phase 0"):
        run({"a@0": [arrive("go@0")]}, {"go@0": 2})


def test_a_tile_that_waits_for_a_later_one_is_found() -> None:
    """The rule by which a run of 200 tiles speaks for shorter ones."""
    early = [mark(0), wait("go@0", 0), mark(1)]
    late = [mark(0), mark(1), arrive("go@0")]
    with pytest.raises(Conflict, match="an event of a tile before 1 waits for one of tile 1 or later"):
        run({"a@0": early, "b@0": late}, {"go@0": 1}, clocks=True)


def test_a_store_that_still_reads_is_found() -> None:
    """Staging is written again before the copy engine has read it; with the drain it is not."""
    def program(left: int) -> list[Action]:
        return [step for i in range(3) for step in (drain(left), use(Touch("out@0", None, i)), store(Touch("out@0", i, None)))]

    run({"epilogue@0": [*program(0), drain(0)]}, {}, clocks=True)
    with pytest.raises(Conflict, match=r"not ordered|finds"):
        run({"epilogue@0": [*program(1), drain(0)]}, {}, clocks=True)


# The kernel's programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", PLAIN, ids=lambda config: config.name)
def test_every_instance_in_every_schedule(config: Config) -> None:
    """Vector clocks over tiles of 3 K blocks and 2 rank blocks, all CTAs of the cluster, multicast, stores and exit included,
    without and with the product with alpha in tensor memory."""
    for rescale in (False, True)[: 1 + config.lora]:
        simulate(config, 7, rescale=rescale, clocks=True)


@pytest.mark.parametrize("stages", range(1, 9))
@pytest.mark.parametrize("config", [SMALL, PAIR], ids=["one", "pair"])
def test_200_tiles_on_1_to_8_stages_in_every_schedule(config: Config, stages: int) -> None:
    """200 tiles per CTA; rule 5 of the model makes it the runs of 1 to 199 as well, but for what follows their last tile."""
    simulate(replace(config, main_stages=stages, lora_stages=9 - stages), 200, 256, 16, rescale=stages % 2 == 0, clocks=True)


@pytest.mark.parametrize("stages", range(1, 9))
def test_1_to_200_tiles_end(stages: int) -> None:
    """What follows the last tile: all ways in which steps can end on rings of up to 8 stages, both parities, and 200 tiles."""
    config = replace(SMALL, main_stages=stages, lora_stages=9 - stages)
    for tiles in (*range(1, 2 * 8 + 2), *range(40, 200, 40), 200):
        simulate(config, tiles, 256, 16)


@pytest.mark.parametrize("config", [SMALL, PAIR, *(c for c in PLAIN if c.cluster_m * c.cluster_n == 4 and c.lora)],
                         ids=lambda config: config.name)
def test_adversarial_schedules(config: Config) -> None:
    """A second witness that knows parity bits and contents only: each role as fast as it can while the others starve, each role
    last, copies and instructions at once or as late as possible."""
    roles = tuple(cluster_programs(config, walk(1), 256, 16))
    counts = set()
    for role, first, late in itertools.product((*roles[:4], roles[-1]), (True, False), (True, False)):
        others = [other for other in roles if other != role]
        counts.add(simulate(config, 3, 600, 80, order=[role, *others] if first else [*others, role], late=late))
    assert len(counts) == 1  # the same events, whatever the order


def without(role: str, kind: Kind, barrier: str = "") -> Edit:
    """Programs that lack a kind of step, in the roles of a name, on the barriers of a name."""
    def edit(name: str, steps: list[Action]) -> list[Action]:
        return [step for step in steps if not (
            name.startswith(role) and step.kind is kind and (not barrier or step.barriers[0].startswith(barrier)))]

    return edit


def without_tail(role: str, steps: list[Action]) -> list[Action]:
    """A load warp that ends with its last copy."""
    return steps[: max(i for i, step in enumerate(steps) if step.kind is Kind.MARK)] if role.startswith("load") else steps


def test_a_cta_that_ends_with_its_last_copy_is_found() -> None:
    """Alone or in a pair the epilogue's wait covers the last release; where pairs share loads, the release of another pair may
    come after it. So the wait at the end of the load warp is needed, and is there."""
    config = next(config for config in PLAIN if (config.cluster_m, config.cluster_n) == (2, 2))
    with pytest.raises(Conflict, match="can have ended when"):
        simulate(config, 6, edit=without_tail, clocks=True)


def released_before_read(role: str, steps: list[Action]) -> list[Action]:
    """Epilogue warps that release an accumulator when it is complete, before they have read it."""
    moved: list[Action] = []
    for step in steps:
        if step.kind is Kind.ARRIVE and step.barriers[0].startswith("acc_empty"):
            last = max(i for i, s in enumerate(moved) if s.kind is Kind.WAIT and s.barriers[0].startswith("acc_full"))
            moved.insert(last + 1, step)
        else:
            moved.append(step)
    return moved


@pytest.mark.parametrize(("edit", "rescale", "says"), [
    (without("load", Kind.WAIT, "main_empty"), False, "can contribute to phase 1 before phase 0"),
    (without("load", Kind.WAIT, "lora_empty"), False, "can contribute to phase 1 before phase 0"),
    (without("mma", Kind.WAIT, "main_full"), False, "not ordered"),
    (without("mma", Kind.WAIT, "acc_empty"), False, "not ordered|finds"),
    (without("mma", Kind.COMMIT, "main_empty"), False, "deadlock"),
    (without("mma", Kind.WAIT, "rescaled"), True, "not ordered|finds"),
    (without("epilogue", Kind.WAIT, "main_done"), True, "not ordered|finds"),
    (without("epilogue", Kind.ARRIVE, "acc_empty"), False, "deadlock"),
    (released_before_read, False, "not ordered|finds"),
    (without("epilogue", Kind.DRAIN), False, "not ordered"),
    (without("epilogue.2", Kind.WAIT, "meet"), False, "meet|not ordered|finds"),
], ids=["load_main", "load_lora", "mma_full", "mma_accumulator", "mma_commit", "mma_rescale", "epilogue_rescale",
        "epilogue_release", "epilogue_order", "epilogue_drain", "epilogue_meet"])
def test_a_fault_in_a_role_is_found(edit: Edit, rescale: bool, says: str) -> None:
    for config in (SMALL, PAIR):
        simulate(config, 6, rescale=rescale, clocks=True)
        with pytest.raises(Conflict, match=says):
            simulate(config, 6, edit=edit, rescale=rescale, clocks=True)


# The fix history of the seed's kernel, in the functions that kernel and programs share --------------------------------


def implicit_state(step: int, stages: int) -> int:
    """61905df: a parity kept in a state of its own, here of six bits: right for the first 64 steps, 21 tiles of 3 blocks."""
    return step % 64 // stages % 2


def whole_lora_up(config: Config) -> int:
    """lora_up counted whole in each CTA of a pair."""
    return config.tile.n * 64 * 2


def misread_tile(place: Place, rank: int, config: Config) -> Place:
    """c3de867: the tile read as (n, m)."""
    return place[1], place[0]


def v_for_n(tile_n: int, rank: int, block: int, config: Config) -> tuple[int, int, int]:
    """b1ca60a: the half of W by the place of the pair along n, where the CTA of the pair is meant."""
    half = config.tile.n // config.tile.ctas
    return tile_n * config.tile.n + rank // config.cluster_m * half, half, block * 256


def test_the_persistent_hang_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 tiles per CTA end, 22 do not: as in the seed, a hang that needs more than 20."""
    config = replace(SMALL, main_stages=5, lora=False, lora_stages=0)
    simulate(config, 22, 768)
    monkeypatch.setattr(schedule, "full_parity", implicit_state)
    monkeypatch.setattr(schedule, "empty_parity", lambda step, stages: 1 - implicit_state(step, stages))
    simulate(config, 20, 768)
    with pytest.raises(Conflict, match="deadlock"):
        simulate(config, 22, 768)


@pytest.mark.parametrize(("name", "mutant", "says"), [
    ("lora_up_bytes", whole_lora_up, "deadlock"),
    ("mma_tile", misread_tile, "finds"),
    ("w_coordinates", v_for_n, "finds"),
])
def test_a_fault_of_the_seeds_history_is_caught(
    name: str, mutant: Callable[..., object], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(PAIR, 3)
    monkeypatch.setattr(schedule, name, mutant)
    with pytest.raises(Conflict, match=says):
        simulate(PAIR, 3)
