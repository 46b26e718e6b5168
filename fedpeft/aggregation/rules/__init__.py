"""The named aggregation rules, one short module each; :mod:`~fedpeft.aggregation.rules.registry` finds them by name."""
