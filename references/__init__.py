"""How numbers behave: formats, roundings, recipes, layouts, datapaths. NumPy only; no op, no backend, no test runner."""
