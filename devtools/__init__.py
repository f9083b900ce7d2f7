"""What dev.py, the tests and the benchmarks need to talk to a ComfyUI server; standard library only."""
