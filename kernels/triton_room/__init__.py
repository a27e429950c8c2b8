"""Machine room of the Triton kernels: each module holds one op's kernel, its operand layouts and what it declares."""
