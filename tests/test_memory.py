"""Guarded host memory, and the torch device on torch's "cpu": where tensors lie and what is noticed around them."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lowbit.conformance.device import ARENA, Allocation, Device, DeviceError, HostDevice, TorchDevice, open_device
from lowbit.conformance.memory import ALIGNMENT, GUARD, POISONS, Damage, GuardedBuffer, Placement, zone_pattern

SIZES = (0, 1, 15, 16, 17, 100, 4080, 4095, 4096, 4097, 8191, 8192, 100_000)
PLACEMENTS: tuple[Placement, ...] = ("end", "start", 16, 48, 4080)


def accessible(address: int) -> bool:
    """Whether the system can read a byte there, asked without touching it: a pipe write reports EFAULT instead of faulting."""
    libc = ctypes.CDLL(None, use_errno=True)
    ends = (ctypes.c_int * 2)()
    libc.pipe(ends)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    written = libc.write(ends[1], address, 1)
    for end in ends:
        libc.close(end)
    return int(written) == 1


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("nbytes", SIZES)
def test_payload_lies_where_the_placement_says(nbytes: int, placement: Placement) -> None:
    with GuardedBuffer(nbytes, placement) as buffer:
        pointer, page = buffer.pointer, mmap.PAGESIZE
        assert pointer % ALIGNMENT == 0
        if placement == "end":
            upper = -(-(pointer + nbytes) // page) * page
            assert upper - (pointer + nbytes) == -nbytes % ALIGNMENT
            assert not accessible(upper)
        else:
            lower = pointer - (0 if placement == "start" else int(placement))
            assert lower % page == 0
            assert not accessible(lower - 1)
        assert all(accessible(pointer + offset) for offset in (0, nbytes - 1) if nbytes)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_guards_are_wide_on_both_sides_and_open_on_request(placement: Placement) -> None:
    for guarded in (True, False):
        with GuardedBuffer(4096, placement, guarded=guarded) as buffer:
            far = (buffer.pointer - 2 * mmap.PAGESIZE, buffer.pointer + 4096 + 2 * mmap.PAGESIZE)
            assert [accessible(address) for address in far] == [not guarded, not guarded]
    assert GUARD == 1 << 20


@pytest.mark.parametrize("placement", ["middle", -16, 8, 4096, True, 16.0, None])
def test_other_placements_are_refused(placement: object) -> None:
    with pytest.raises(ValueError, match="placement must be 'end', 'start' or a multiple of 16 below 4096, got"):
        GuardedBuffer(64, placement)  # type: ignore[arg-type]


def test_negative_size_is_refused() -> None:
    with pytest.raises(ValueError, match="0 bytes or more, got -1"):
        GuardedBuffer(-1)


def test_every_byte_of_the_red_zones_is_watched() -> None:
    """Slack of a 20-byte tensor at "end": 12 bytes above (32 - 20), the rest of the page below."""
    below, above = mmap.PAGESIZE - 32, 12
    for offset in [*range(-below, 0), *range(20, 20 + above)]:
        with GuardedBuffer(20, "end") as buffer:
            ctypes.memset(buffer.pointer + offset, (int(zone_pattern(buffer.pointer + offset, 1)[0]) + 1) & 0xFF, 1)
            side, nearest = ("before", -offset - 1) if offset < 0 else ("after", offset - 20)
            assert buffer.damage() == (Damage(side, nearest, 1),)  # type: ignore[arg-type]


def test_no_constant_byte_and_no_shifted_copy_looks_like_a_red_zone() -> None:
    zone = zone_pattern(0x7F0000000123, 4096)
    assert [int(byte) for byte in zone[:3]] == [(37 * 0x23 + 11) % 256, (37 * 0x24 + 11) % 256, (37 * 0x25 + 11) % 256]
    assert len(set(zone[:256].tolist())) == 256
    for shift in range(1, 256):
        assert (zone[shift : shift + 256] != zone[:256]).all()


def test_writes_to_the_payload_are_no_damage() -> None:
    for placement in PLACEMENTS:
        with GuardedBuffer(1003, placement) as buffer:
            buffer.fill(0x5A)
            assert (buffer.payload == 0x5A).all()
            assert buffer.damage() == ()


def test_open_guards_report_a_write_far_outside() -> None:
    with GuardedBuffer(4096, "end", guarded=False) as buffer:
        ctypes.memset(buffer.pointer + 4096 + 70_000, 0x77, 1)
        ctypes.memset(buffer.pointer - 90_000, 0x77, 1)
        assert buffer.damage() == (Damage("before", 89_999, 1), Damage("after", 70_000, 1))


def test_first_difference_finds_each_byte() -> None:
    data = np.arange(300, dtype=np.uint32).astype(np.uint8)
    with GuardedBuffer(300) as buffer:
        buffer.payload[:] = data
        assert buffer.first_difference(data) is None
        for offset in range(300):
            buffer.payload[offset] ^= 0x80
            assert buffer.first_difference(data) == offset
            buffer.payload[offset] ^= 0x80
        with pytest.raises(ValueError, match="got 299 bytes to compare with 300"):
            buffer.first_difference(data[:299])


def test_views_are_strided_and_stay_inside() -> None:
    with GuardedBuffer(2 * (2 * 5 + 3)) as buffer:  # rows of 3 in a pitch of 5, the last one unpadded: 13 elements
        view = buffer.view(np.dtype(np.uint16), (3, 3), (5, 1))
        view[2, 2] = 0xABCD
        assert buffer.payload[24:].tolist() == [0xCD, 0xAB]
        assert view.ctypes.data == buffer.pointer
        for shape, strides in [((3, 4), (5, 1)), ((4, 3), (5, 1)), ((14,), (1,)), ((2, 2), (-1, 1))]:
            with pytest.raises(ValueError, match="does not fit in 26 bytes"):
                buffer.view(np.dtype(np.uint16), shape, strides)
        assert buffer.view(np.dtype(np.uint16), (0, 9), (9, 1)).shape == (0, 9)


def test_a_write_past_the_end_kills_the_process() -> None:
    script = (
        "import ctypes; from lowbit.conformance.memory import GuardedBuffer\n"
        "b = GuardedBuffer(64); ctypes.memset(b.pointer, 1, 64); print('inside', flush=True); ctypes.memset(b.pointer + 64, 1, 1)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.stdout == "inside\n"
    assert ended.returncode in (-11, -10, -7)  # SIGSEGV, or SIGBUS on macOS (10) and Linux (7)


def test_the_poisons_differ_in_every_bit_pattern_that_matters() -> None:
    first, second = (np.full(8, byte, dtype=np.uint8) for byte in POISONS)
    assert np.isnan(first.view(np.float16)).all()
    assert np.isnan(first.view(np.float32)).all()
    assert np.isfinite(second.view(np.float16)).all()
    assert np.isfinite(second.view(np.float32)).all()


def devices() -> list[Device]:
    return [HostDevice(), TorchDevice("cpu")]


@pytest.mark.parametrize("which", [0, 1], ids=["host", "torch"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("nbytes", [0, 1, 16, 1000, 70_000])
def test_devices_move_bytes_and_notice_damage(which: int, placement: Placement, nbytes: int) -> None:
    device = devices()[which]
    data = zone_pattern(5, nbytes)[::-1].copy()
    memory = device.alloc(nbytes, placement, guarded=False)
    assert memory.pointer % ALIGNMENT == 0
    device.upload(memory, data)
    assert np.array_equal(device.download(memory), data)
    assert device.first_difference(memory, data) is None
    if nbytes:
        data[nbytes // 2] ^= 1
        assert device.first_difference(memory, data) == nbytes // 2
    device.fill(memory, 0x5A)
    assert (device.download(memory) == 0x5A).all()
    assert device.damage(memory) == ()
    for at in (-1, nbytes, -ARENA, nbytes + ARENA - 1):
        ctypes.memset(memory.pointer + at, (ctypes.c_ubyte.from_address(memory.pointer + at).value + 1) & 0xFF, 1)
    assert device.damage(memory) == (Damage("before", 0, 2), Damage("after", 0, 2))
    device.synchronize()
    device.free(memory)


def test_the_torch_device_places_tensors_at_different_alignments() -> None:
    device = TorchDevice("cpu")
    starts = [device.alloc(100, placement) for placement in ("start", 16, "end")]
    assert [memory.pointer % 256 for memory in starts] == [0, 16, 256 - 112]


def test_the_torch_device_hands_out_strided_tensors_of_integer_containers() -> None:
    device = TorchDevice("cpu")
    for itemsize, name in ((1, "torch.uint8"), (2, "torch.int16"), (4, "torch.int32"), (8, "torch.int64")):
        memory: Allocation = device.alloc(13 * itemsize, "end")
        device.fill(memory, 0)
        view = device.view(memory, itemsize, (3, 3), (5, 1))
        view[1, 2] = 1
        assert (str(view.dtype), tuple(view.shape), view.stride()) == (name, (3, 3), (5, 1))
        assert view.data_ptr() == memory.pointer
        assert np.flatnonzero(device.download(memory)).tolist() == [7 * itemsize]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:99", r"device cuda:99 is not there: this torch \(.*\) sees \d+ (cuda|hip) device"),
        ("hip:99", "device hip:99 is not there"),
        ("cpu:1", "device cpu:1 is not there: .* sees 1 cpu"),
        ("npu", "device 'npu' needs the package torch_npu; install it"),
        ("tpu", "unknown device 'tpu'; known are host, cpu, cuda, hip, xpu, npu"),
        ("cuda:x", "device 'cuda:x' is malformed"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_sentence(name: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        open_device(name)
    assert "\n" not in str(caught.value)


def test_without_torch_the_host_works_and_the_torch_device_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lowbit.conformance.device import DeviceError, open_device\n"
        "print(open_device('host').name)\n"
        "try: open_device('cuda')\nexcept DeviceError as error: print(error)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout == "host\ndevice 'cuda' needs the package torch; install it (no torch here)\n"
