"""How it is computed: one door per target. Importing this package imports no framework."""
