"""Run a study: plan, keys, jobs, cache, notebooks, collection."""
