"""Machine room of the rocm target: which chip there is, the skinny fp8 product, and the layer that chooses between products."""
