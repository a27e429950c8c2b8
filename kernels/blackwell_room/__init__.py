"""Machine room of the cuda_blackwell target: schedule and index arithmetic, packing, and the CuTe DSL kernel that uses them."""
