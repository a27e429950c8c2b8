"""Machine room of the xpu target: OpenCL C kernels, what finds a device and builds them, and what they declare."""
