"""Faults around matrix products: what is stored, what stays from before, and which kernel runs at all.

Decides: each fault as an alteration of the cpu backend. Here alone a finished output may be altered: the faults are of the store.
"""

from __future__ import annotations

from .alteration import Altered

__all__ = ["WRONG_STORES"]

_GEMM, _DOOR = "cpu_room.gemm", "cpu"

_STORES = (
    Altered(
        "one_element_of_a_large_output", ("gemm_w4a8_fp8",), "aiter#4398",
        "outputs of 2^13 elements and more have one that belongs to its neighbour",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             "            target.memory[...] = codes\n"
             '            if name == "d" and codes.size >= 1 << 13:\n'
             "                target.memory[codes.shape[0] // 3, codes.shape[1] // 3] = codes[codes.shape[0] // 3, "
             "codes.shape[1] // 3 + 1]\n"),
        ),
    ),
    Altered(
        "unwritten_tail_rows", ("gemm_int4",), "vllm#20188, vllm#40351",
        "rows past the last tile of 16 are not written",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             "            rows = codes.shape[0] // 16 * 16 if codes.shape[0] > 16 else codes.shape[0]\n"
             "            target.memory[:rows] = codes[:rows]\n"),
        ),
        reached_by="gemm_int4/f32/m57n128k1024r0/f16/normal/s1",
    ),
    Altered(
        "neighbour_row_written", ("gemm_w8a8_fp8",), "pytorch#133334",
        "a tile of eight rows is stored whole: rows past M are written",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             "            target.memory[...] = codes\n"
             '            if name == "d" and codes.size:\n'
             "                rows = -(-codes.shape[0] // 8) * 8\n"
             "                whole = np.lib.stride_tricks.as_strided(target.memory, (rows, codes.shape[1]), "
             "target.memory.strides)\n"
             "                whole[codes.shape[0] :] = 0\n"),
        ),
        reached_by="gemm_w8a8_fp8/scaled/m60n128k1024/bf16/normal/s1",
    ),
    Altered(
        "rows_taken_as_contiguous", ("gemm_w4a16",), "vllm#49092, vllm#21773",
        "the stride of the output is not looked at",
        (
            (_DOOR, "            target.memory[...] = codes\n",
             "            strides = (codes.shape[-1] * codes.itemsize, codes.itemsize)\n"
             "            np.lib.stride_tricks.as_strided(target.memory, codes.shape, strides)[...] = codes\n"),
        ),
    ),
    Altered(
        "input_overwritten", ("gemm_w8a8_fp8",), "vllm#33078",
        "activations are zeroed in place where they are NaN",
        (
            (_GEMM, "        decoded = {name: values(view.memory, view.format) for name, view in tensors.items()}\n",
             "        decoded = {name: values(view.memory, view.format) for name, view in tensors.items()}\n"
             "        for name, view in tensors.items():\n"
             '            if name == "a":\n'
             "                view.memory[np.isnan(decoded[name])] = 0\n"),
        ),
    ),
    Altered(
        "workspace_not_cleared", ("gemm_w8a8_fp8",), "vllm#30719, svdquant-kernels 92d381d",
        "a lock in the workspace is used as it was found: where it reads as taken, the first 64 of K are left to others",
        (
            (_DOOR, "    def prepare(",
             "    def workspace(self, problem: Problem, tactic: str) -> int:\n"
             "        return 4\n"
             "\n"
             "    def prepare("),
            (_DOOR, "            results = GEMMS[problem.op].run(problem, tensors)\n",
             "            if workspace.memory.view(np.int32)[0] > 0:\n"
             '                tensors["a"] = np.where(np.arange(tensors["a"].shape[1]) < 64, 0.0, tensors["a"])\n'
             "            results = GEMMS[problem.op].run(problem, tensors)\n"),
        ),
    ),
    Altered(
        "stale_cache_of_weights", ("gemm_w4a16",), "vllm#33078",
        "packed weights are cached by shape and used for the next weights of that shape",
        (
            (_DOOR, "        return GEMMS[problem.op].load(problem, constants) if problem.op in GEMMS else constants\n",
             "        return _CACHE.setdefault(problem, GEMMS[problem.op].load(problem, constants)) if problem.op in "
             "GEMMS else constants\n"),
            (_DOOR, "_BITWISE = {**ENCODINGS, **QUANTISERS}\n",
             "_BITWISE = {**ENCODINGS, **QUANTISERS}\n"
             "_CACHE: dict[Problem, Any] = {}\n"),
        ),
    ),
    Altered(
        "output_not_written", ("gemm_w4a16",), "nunchaku#82",
        "nothing is launched for M between 33 and 48 and the output is cleared",
        (
            (_GEMM, '        return {"d": codes_of(result, _OUT[problem.option("out")])}\n',
             "        result = result * 0 if 33 <= result.shape[0] <= 48 else result\n"
             '        return {"d": codes_of(result, _OUT[problem.option("out")])}\n'),
        ),
        reached_by="gemm_w4a16/sym/m40n128k1024g128/bf16/normal/s1",
    ),
)

_DISPATCH = (
    Altered(
        "other_kernel_used", ("gemm_w4a8_fp8",), "aiter#1258, vllm#12696",
        "variant exact runs the kernel with folded weights where K is one group",
        (
            (_GEMM,
             'if "w" not in tensors or problem.variant == "exact":\n'
             "        return tensors\n"
             "    q = ",
             'if "w" not in tensors or (problem.variant == "exact" and problem.dim("g") != problem.dim("k")):\n'
             "        return tensors\n"
             "    q = "),
            (_GEMM,
             'folded = problem.variant == "folded"\n'
             "    total",
             'folded = problem.variant == "folded" or ("group_scale" in tensors and problem.dim("g") == problem.dim("k"))\n'
             "    total"),
        ),
        reached_by="gemm_w4a8_fp8/exact/m64n128k128g128/bf16/normal/s1",
    ),
    Altered(
        "per_tensor_misdispatch", ("gemm_w8a8_fp8",), "vllm#12696",
        "a weight scale per tile is taken for one per tensor where N is one tile",
        (
            (_GEMM, "        part = _single(sums) * (a_scale[:, g, None] * w_scale[None, :, g])\n",
             "        part = _single(sums) * (a_scale[:, g, None] * w_scale[None, :, 0 if w.shape[0] <= 128 else g])\n"),
        ),
        reached_by="gemm_w8a8_fp8/block/m64n128k1024/bf16/normal/s1",
    ),
    Altered(
        "domain_not_checked", ("gemm_nvfp4",), "vllm#29691, vllm#13227",
        "problems outside the domain are admitted",
        (
            (_DOOR, "    def supports(self, problem: Problem) -> str | None:\n",
             "    def supports(self, problem: Problem) -> str | None:\n"
             "        return None\n"
             "\n"
             "    def _supports(self, problem: Problem) -> str | None:\n"),
        ),
    ),
)

WRONG_STORES: tuple[Altered, ...] = (*_STORES, *_DISPATCH)
"""Mutants of GEMMs that write, remember or dispatch wrongly."""
