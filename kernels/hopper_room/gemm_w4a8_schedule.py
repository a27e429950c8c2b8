"""The scratch memory of products whose tiles are dealt out among workers by the block of K: gemm_w4a8_schedule.cuh in Python.

Decides: how many bytes are enough on any device of compute capability 9.0, from sizes alone, so that it is known where there is
no device. Refuses nothing.
"""

from __future__ import annotations

__all__ = ["stream_bytes"]

_MOST_BLOCKS = 144  # blocks of threads that work at once, as in gemm_w4a8_tiles.cuh
_LEAST_BLOCKS = 4  # blocks of 128 k per worker, as in gemm_w4a8_schedule.cuh
_BLOCK = 128  # k of a packed block, 64 rows high


def stream_bytes(tokens: int, bands: int, cluster: int, m: int, n: int, k: int) -> int:
    """Bytes of slots and counters for a product of M rows of A by N rows of W: blocks of 64 `bands` rows of W by `tokens` rows of
    A, `cluster` of them with neighbouring rows in a worker. A worker has two slots of a sum in f32 for each of its elements; with
    each slot goes a counter per 64 rows."""
    tiles = -(-n // (64 * bands * cluster)) * -(-m // tokens)
    workers = min(_MOST_BLOCKS // cluster, tiles * max(1, -(-k // _BLOCK) // _LEAST_BLOCKS))
    return 2 * workers * cluster * bands * (64 * tokens * 4 + 4)
