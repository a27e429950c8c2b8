"""Machine room of the cuda_hopper target: kernels for compute capability 9.0 in CUDA C++, how they are built, and their hosts.

build.py compiles and keeps libraries, device.py says where they can run; each other module is the host of a few ops and stands
beside the .cu file of its name.
"""
