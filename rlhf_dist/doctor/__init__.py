"""``python -m rlhf_dist.main doctor``: whether a cluster can hold a run, before the run.

``examine`` asks, ``probes`` answers on every node, with ``torch_child`` where torch is needed; ``judge`` and
``resources`` say what the answers mean.
"""
