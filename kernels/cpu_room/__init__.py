"""Machine room of the cpu target: codec, GEMMs, encodings and quantisers in NumPy, sharing no arithmetic with the judge."""
