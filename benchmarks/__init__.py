"""Speed, memory and quality, ours and of peers: `python -m benchmarks run NAME`. results/ keeps what was measured."""
