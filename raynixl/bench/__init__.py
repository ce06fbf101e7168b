"""Benchmarks behind `raynixl bench`: each measures ours and named baselines in turn, in one run, and checks bytes."""
