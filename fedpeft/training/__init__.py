"""Local training: one client, one round; deterministic by seed, the same code in simulation and in an agent."""
