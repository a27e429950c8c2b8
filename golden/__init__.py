"""Golden vectors: generated, schema-checked, never edited by hand. This package holds data files and their generator."""
