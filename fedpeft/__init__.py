"""fedpeft: federated parameter-efficient fine-tuning.

The base model stays frozen at every participant and never travels; only *adapter deltas* do. This package is the pure
library: adapters, aggregation, training, the round state machine and the store. It imports no network, no web and no
command-line framework and can be used from a notebook. The daemon, the agent and the simulator are built on it in
``fedpeft_server``, ``fedpeft_client`` and ``fedpeft_simulations``.
"""

__version__ = "0.1.0"
