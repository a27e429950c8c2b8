"""Subjects: adapters that put kernels of other projects under test, as ordinary backends. One module per project."""
