"""Speed, memory and quality, ours and those of peers: each file runs as `python -m benchmarks.NAME`; results/ keeps what came out."""
