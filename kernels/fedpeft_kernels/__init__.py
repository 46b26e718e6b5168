"""Compute paths for low-rank adapters, and what the hardware can do. Knows torch, and nothing of federation."""
