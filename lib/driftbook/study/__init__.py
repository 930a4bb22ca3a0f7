"""The study file, its variants, sources, tables and folders."""
