"""The host side of the ascend device path, executed against a libascendcl.so of our own making.

The stand-in keeps real memory, writes every call with its arguments to a log and fails where it is told to. The stand-in for
bisheng builds the kernel with the emulation headers, so that what goes up, is started and comes down is real data. Neither says
anything about a device: they show that the host calls what CANN documents, in order, and stops at the first error.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lowbit.kernels.ascend import backend
from lowbit.kernels.ascend_room import cann, launch
from lowbit.kernels.ascend_room.build import DEVICE, EMULATION, BuildError, compiler, device_library
from lowbit.kernels.ascend_room.cann import CannError, devices, open_runtime
from lowbit.kernels.ascend_room.entries import ENTRIES
from lowbit.kernels.ascend_room.launch import Choice, Engine, run

RUNTIME = r"""
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {
std::map<uintptr_t, size_t> owned;
const char* recent = nullptr;

int Said(const char* name, const char* text)
{
    if (FILE* log = std::fopen(std::getenv("FAKE_ACL_LOG"), "a")) {
        std::fprintf(log, "%s%s\n", name, text);
        std::fclose(log);
    }
    const char* fault = std::getenv("FAKE_ACL_FAIL");
    const size_t length = std::strlen(name);
    if (fault != nullptr && std::strncmp(fault, name, length) == 0 && fault[length] == ':') {
        recent = "the stand-in was told to fail";
        return std::atoi(fault + length + 1);
    }
    return 0;
}
}  // namespace

extern "C" {
int aclInit(const char* config) { return Said("aclInit", config == nullptr ? " null" : config); }
int aclrtGetDeviceCount(uint32_t* count)
{
    *count = std::atoi(std::getenv("FAKE_ACL_DEVICES"));
    return Said("aclrtGetDeviceCount", "");
}
int aclrtSetDevice(int32_t device) { return Said("aclrtSetDevice", device == 0 ? " 0" : " other"); }
#ifndef WITHOUT_STREAM
int aclrtCreateStream(void** stream)
{
    *stream = reinterpret_cast<void*>(0x57AE);
    return Said("aclrtCreateStream", "");
}
#endif
int aclrtMalloc(void** address, size_t size, int32_t policy)
{
    char text[64];
    std::snprintf(text, sizeof text, " %zu %d", size, policy);
    const int code = Said("aclrtMalloc", text);
    if (code == 0) {
        *address = std::malloc(size);
        std::memset(*address, 0xCD, size);
        owned[reinterpret_cast<uintptr_t>(*address)] = size;
    }
    return code;
}
int aclrtFree(void* address)
{
    const int code = Said("aclrtFree", "");
    if (owned.erase(reinterpret_cast<uintptr_t>(address)) != 1) {
        return 100000;
    }
    std::free(address);
    return code;
}
int aclrtMemcpy(void* to, size_t room, const void* from, size_t count, int32_t kind)
{
    char text[64];
    std::snprintf(text, sizeof text, " %zu %zu %d", room, count, kind);
    const int code = Said("aclrtMemcpy", text);
    const auto device = reinterpret_cast<uintptr_t>(kind == 1 ? to : from);
    if (count > room || owned.count(device) != 1 || count > owned[device]) {
        return 100000;
    }
    std::memcpy(to, from, count);
    return code;
}
int aclrtSynchronizeStream(void* stream)
{
    return Said("aclrtSynchronizeStream", stream == reinterpret_cast<void*>(0x57AE) ? " 0x57AE" : " other");
}
const char* aclGetRecentErrMsg() { return recent; }
const char* aclrtGetSocName() { return "Ascend910B-stand-in"; }
uint64_t fake_size(const void* address)
{
    const auto found = owned.find(reinterpret_cast<uintptr_t>(address));
    return found == owned.end() ? 0 : found->second;
}
size_t fake_alive() { return owned.size(); }
void fake_log(const char* text) { Said(text, ""); }
}
"""

# What replaces the kernel's launch syntax: the same kernel, run by the emulation on the memory of the stand-in.
KERNEL = r"""
#include "launch.h"
#include "SOURCE.cpp"
extern "C" uint64_t fake_size(const void*);
extern "C" void fake_log(const char*);
extern "C" void lowbit_launch(uint32_t blocks, void* stream, uint8_t** addresses)
{
    char text[4096];
    std::snprintf(text, sizeof text, "launch SOURCE %u %p", blocks, stream);
    fake_log(text);
    lowbit::Buffer buffers[COUNT];
    for (int i = 0; i < COUNT; ++i) {
        buffers[i] = {addresses[i], fake_size(addresses[i]), 7, 0};
    }
    if (lowbit::Launch(&SOURCE, lowbit::Mode::MODE, 2, buffers, COUNT, text, sizeof text) != 0) {
        fake_log(text);
    }
}
"""


@dataclass(frozen=True, slots=True)
class Toolkit:
    """A folder that looks like a CANN installation, and the log of its runtime."""

    home: Path
    log: Path

    def lines(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cann")
    (folder / "lib64").mkdir()
    (folder / "bin").mkdir()
    source = folder / "runtime.cpp"
    source.write_text(RUNTIME, encoding="utf-8")
    for name, flags in (("lib64/libascendcl.so", ()), ("old.so", ("-DWITHOUT_STREAM",))):
        made = folder / name
        subprocess.run(["g++", "-O1", "-shared", "-fPIC", *flags, source, "-o", made, f"-Wl,-soname,{made}"], check=True)
    kernel = KERNEL.replace("SOURCE", "pack_int4").replace("COUNT", "4").replace("MODE", "AIV")
    (folder / "kernel.cpp").write_text(kernel, encoding="utf-8")
    parts = " ".join(str(path) for path in sorted(EMULATION.glob("*.cpp")))
    bisheng = folder / "bin" / "bisheng"
    bisheng.write_text(
        f"""#!/bin/sh
if [ "$1" = --version ]; then echo stand-in; exit 0; fi
printf '%s\\n' "$*" >> {folder}/bisheng.log
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; case "$1" in *.asc) cp "$1" {folder}/glue.asc;; esac; shift; done
exec g++ -std=c++17 -O2 -ffp-contract=off -fPIC -shared -pthread -I{DEVICE} -I{EMULATION} {folder}/kernel.cpp {parts} \
    {folder}/lib64/libascendcl.so -o "$out"
""",
        encoding="utf-8",
    )
    bisheng.chmod(0o755)
    return folder


@pytest.fixture
def toolkit(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toolkit]:
    log = tmp_path / "acl.log"
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    monkeypatch.setenv("FAKE_ACL_LOG", str(log))
    monkeypatch.setenv("FAKE_ACL_DEVICES", "1")
    monkeypatch.delenv("FAKE_ACL_FAIL", raising=False)
    open_runtime.cache_clear()
    launch.engine.cache_clear()
    yield Toolkit(home, log)
    open_runtime.cache_clear()
    launch.engine.cache_clear()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for the module: the kernel is compiled once."""
    return tmp_path_factory.mktemp("cache")


def nodes(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_without_runtime_and_nodes_there_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))  # a folder without a library
    assert devices(nodes(tmp_path, "null", "davinci_manager")) == 0


def test_nodes_without_a_runtime_are_an_error_and_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    with pytest.raises(CannError, match=r"got an NPU .* no usable libascendcl\.so .*set_env\.sh"):
        devices(nodes(tmp_path, "davinci0"))


def test_devices_are_counted_by_the_runtime(toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = nodes(tmp_path, "davinci0")
    monkeypatch.setenv("FAKE_ACL_DEVICES", "3")
    assert devices(folder) == 3
    assert toolkit.lines() == ["aclInit null", "aclrtGetDeviceCount"]
    monkeypatch.setenv("FAKE_ACL_DEVICES", "0")
    with pytest.raises(CannError, match="got 0 devices from aclrtGetDeviceCount"):
        devices(folder)


def test_a_runtime_that_does_not_start_is_an_error_only_beside_a_visible_device(
    toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ACL_FAIL", "aclrtGetDeviceCount:507899")
    with pytest.raises(CannError, match=r"aclrtGetDeviceCount returned aclError 507899, expected 0 \(the stand-in was told"):
        devices(nodes(tmp_path, "davinci0"))
    assert devices(tmp_path) == 0  # a toolkit in a container without a device


def test_a_second_aclinit_of_the_process_is_no_error(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAKE_ACL_FAIL", "aclInit:100002")
    assert devices(tmp_path) == 1
    assert open_runtime().stream == 0x57AE


@pytest.mark.parametrize(
    ("function", "code", "advice"),
    [("aclInit", 100000, "one release"), ("aclrtSetDevice", 107001, "ASCEND_RT_VISIBLE_DEVICES"),
     ("aclrtCreateStream", 7, "aclError table")],
)
def test_a_device_that_does_not_start_names_function_number_and_advice(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, function: str, code: int, advice: str
) -> None:
    monkeypatch.setenv("FAKE_ACL_FAIL", f"{function}:{code}")
    with pytest.raises(CannError, match=f"{function} returned aclError {code}, expected 0 .*{advice}"):
        open_runtime()
    if function != "aclInit":  # the device is counted, then fails: the backend raises and does not emulate
        with pytest.raises(CannError, match=f"{function} returned aclError {code}"):
            launch.engine(Choice())


def test_an_older_runtime_names_the_function_it_lacks(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    old = ctypes.CDLL(str(toolkit.home / "old.so"))
    monkeypatch.setattr(cann, "_load", lambda folder: (old, False))
    with pytest.raises(CannError, match=r"got a libascendcl\.so without aclrtCreateStream, expected that of CANN 8\.0 or later"):
        open_runtime()


def test_opening_calls_the_runtime_in_the_documented_order(toolkit: Toolkit) -> None:
    runtime = open_runtime()
    assert (runtime.device, runtime.stream, runtime.soc) == (0, 0x57AE, "Ascend910B-stand-in")
    assert toolkit.lines() == ["aclInit null", "aclrtSetDevice 0", "aclrtCreateStream"]


def test_a_launch_uploads_starts_waits_downloads_and_frees(
    toolkit: Toolkit, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    place = Engine(Choice(), open_runtime())
    assert place.execution == "executed"
    toolkit.log.unlink()
    codes = np.arange(64, dtype=np.uint8) & 15
    packed = np.zeros(32, np.uint8)
    assert run(place, "pack_int4", {"codes": codes, "packed": packed}, {"count": 64, "offset": 0}) == "pack_int4"
    # bytes 0x10, 0x32, ... 0xFE, four times over
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4
    assert toolkit.lines() == [
        "aclrtMalloc 64 0", "aclrtMemcpy 64 64 1",  # codes
        "aclrtMalloc 32 0", "aclrtMemcpy 32 32 1",  # packed, as it is
        "aclrtMalloc 1 0",  # workspace
        "aclrtMalloc 8 0", "aclrtMemcpy 8 8 1",  # tiling
        "launch pack_int4 40 0x57ae", "aclrtSynchronizeStream 0x57AE",
        "aclrtMemcpy 32 32 2",
        "aclrtFree", "aclrtFree", "aclrtFree", "aclrtFree",
    ]
    glue = (toolkit.home / "glue.asc").read_text(encoding="utf-8")
    assert "pack_int4<<<blocks, nullptr, stream>>>(addresses[0], addresses[1], addresses[2], addresses[3]);" in glue
    command = (toolkit.home / "bisheng.log").read_text(encoding="utf-8")
    assert command.startswith("-x asc --npu-arch=dav-2201 -std=c++17 -O2 -fPIC -shared -I")
    assert command.count("\n") == 1  # compiled once


def test_a_backend_with_a_device_says_executed_and_names_it(toolkit: Toolkit) -> None:
    found = backend()
    assert found.execution == "executed"
    about = found.describe()
    assert (about["device"], about["compiler"]) == ("Ascend910B-stand-in, device 0", "bisheng, --npu-arch=dav-2201")
    assert not {"emulation", "rules", "remains to be shown on silicon"} & set(about)
    assert backend("emulate").execution == "emulated"


def test_addresses_and_npu_tensors_are_passed_on_as_they_are(
    toolkit: Toolkit, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    runtime = open_runtime()
    address = ctypes.c_void_p()
    runtime.library.aclrtMalloc(ctypes.byref(address), ctypes.c_size_t(64), 0)
    ctypes.memset(address, 0x07, 64)
    toolkit.log.unlink()
    tensor = SimpleNamespace(
        data_ptr=lambda: address.value, device=SimpleNamespace(type="npu"), is_contiguous=lambda: True,
    )
    for codes in (tensor, address.value):
        packed = np.zeros(32, np.uint8)
        run(Engine(Choice(), runtime), "pack_int4", {"codes": codes, "packed": packed}, {"count": 64, "offset": 0})
        assert packed.tolist() == [0x77] * 32
    assert toolkit.lines().count("aclrtMalloc 64 0") == 0
    on_host = SimpleNamespace(data_ptr=lambda: 1, device=SimpleNamespace(type="cpu"), is_contiguous=lambda: True)
    with pytest.raises(ValueError, match=r"got a tensor on .*cpu.* expected a contiguous one on npu"):
        run(Engine(Choice(), runtime), "pack_int4", {"codes": on_host, "packed": packed}, {"count": 64, "offset": 0})
    runtime.library.aclrtFree(address)
    assert runtime.library.fake_alive() == 0


@pytest.mark.parametrize(
    ("function", "code", "advice"),
    [("aclrtMalloc", 207001, "out of device memory"), ("aclrtMemcpy", 107002, "no context"),
     ("aclrtSynchronizeStream", 507015, "illegal address"), ("aclrtSynchronizeStream", 507014, "time limit")],
)
def test_a_call_that_fails_stops_the_launch_and_frees_what_it_took(
    toolkit: Toolkit, cache: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, advice: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    runtime = open_runtime()
    monkeypatch.setenv("FAKE_ACL_FAIL", f"{function}:{code}")
    operands = {"codes": np.zeros(64, np.uint8), "packed": np.zeros(32, np.uint8)}
    with pytest.raises(CannError, match=f"{function} returned aclError {code}, expected 0 .*{advice}"):
        run(Engine(Choice(), runtime), "pack_int4", operands, {"count": 64, "offset": 0})
    assert "aclrtMemcpy 32 32 2" not in toolkit.lines()  # nothing is read back after an error
    assert runtime.library.fake_alive() == 0


def test_a_strided_operand_is_refused_before_anything_is_allocated(toolkit: Toolkit) -> None:
    runtime = open_runtime()
    toolkit.log.unlink()
    operands = {"codes": np.zeros(128, np.uint8)[::2], "packed": np.zeros(32, np.uint8)}
    with pytest.raises(ValueError, match=r"pack_int4: got codes with strides \(2,\), expected a C-contiguous array"):
        run(Engine(Choice(), runtime), "pack_int4", operands, {"count": 64, "offset": 0})
    assert toolkit.lines() == []


def test_a_missing_device_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"got no bisheng on PATH, expected one .*CANN toolkit"):
        device_library(ENTRIES["pack_int4"], tmp_path)


def test_a_compiler_that_fails_shows_its_complaint_and_keeps_nothing(
    toolkit: Toolkit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "bisheng"
    broken.parent.mkdir()
    script = """#!/bin/sh\n[ "$1" = --version ] && exit 0\necho 'glue.asc:3:9: error: unknown arch' >&2\nexit 1\n"""
    broken.write_text(script, encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BuildError, match=r"got exit code 1 from .*bisheng, expected a library of pack_int4\.cpp: .*unknown arch"):
        device_library(ENTRIES["pack_int4"], tmp_path)
    assert list((tmp_path / "cache").rglob("*.so")) == []


def test_the_toolkits_compiler_is_taken_before_that_on_path(home: Path) -> None:
    assert compiler("bisheng", "", (home / "bin",)) == home / "bin" / "bisheng"
