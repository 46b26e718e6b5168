"""The two components that Flower loads. Everything is in the installed ``fedpeft``; see the README beside this file."""

from fedpeft_simulations.flower_app import client_app, server_app

__all__ = ["client_app", "server_app"]
