"""Machine room of the matrix-unit probes: one instruction per kernel, many tiles per launch, raw bits out.

A probe decides nothing about arithmetic: it brings given bits to one instruction and its result bits back.
"""

from __future__ import annotations

__all__: list[str] = []
