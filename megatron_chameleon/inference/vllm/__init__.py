"""Engine 2: an unpatched vLLM in processes of its own, which loads ``plugins/``.

vLLM is an extra, so it is imported only where it runs.
"""
