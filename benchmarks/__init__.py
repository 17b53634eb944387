"""Speed, memory and quality, ours and of peers. Each file runs as `python -m benchmarks.NAME`; results/ keeps the results."""
