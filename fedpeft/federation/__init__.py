"""The federated run: who takes part, what a participant does, and the state machine of the coordinator.

Simulation and deployment drive the same objects: a :class:`~fedpeft.federation.participant.Participant` turns a global
state and local data into a delta, a :class:`~fedpeft.federation.run.FederatedRun` turns accepted deltas into the next
global state. Neither knows how bytes get from one to the other.
"""
