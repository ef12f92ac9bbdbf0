"""The algorithms of the field as pure functions on tensors: tensors and numbers in, tensors out.

Everything is padded: ``[B, T]`` with a ``mask`` of the same shape (bool or 0/1) whose ones are the trained response
tokens. A row is one sample. What stands at masked positions never matters, not even NaN.

The tables of :mod:`~rlhf_dist.algorithms.registry` are what the config chooses from.
"""
