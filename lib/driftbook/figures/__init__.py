"""Draw tables: a figure computes positions and nothing else."""
