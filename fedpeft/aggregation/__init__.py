"""Aggregation: from accepted deltas to the next global state.

Clients send *differences* (trained minus the state that the round started from). The coordinator computes ::

    new = start + (sum_k w_k delta_k) / (sum_k w_k)        w_k: integer, public (number of examples, or 1)

:mod:`~fedpeft.aggregation.protocols` has the seams, :mod:`~fedpeft.aggregation.fixed_point` the sum that does not
depend on the order of arrival and can be undone to the last bit, :mod:`~fedpeft.aggregation.linear_mean` the mean over
a whole state, :mod:`~fedpeft.aggregation.exactness` the distance from the true mean of the clients' updates, and
:mod:`~fedpeft.aggregation.rules` the named methods.
"""
