"""The cases as pytest items: `pytest --pyargs lowbit.conformance -p lowbit.conformance.plugin --backend NAME`."""
