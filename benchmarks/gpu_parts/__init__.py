"""The parts of ``benchmarks/gpu.py``: each measures one thing in a process of its own."""
