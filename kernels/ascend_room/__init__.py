"""Machine room of the ascend target: AscendC kernels for the 910B, their host, and the emulation that runs them without one.

device/ holds the kernel sources as the vendor's compiler reads them; emulation/ the headers under which g++ compiles the same
files; rules.py what the emulation enforces, with sources.
"""
