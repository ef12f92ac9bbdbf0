"""Reinforcement learning from human feedback on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
