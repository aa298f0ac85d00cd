"""asyncexec inside other engines: each integration needs that engine, and is imported by nothing else."""
