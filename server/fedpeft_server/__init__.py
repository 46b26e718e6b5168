"""The server daemon: one process, one gRPC port under mutual TLS, Flower embedded.

:mod:`~fedpeft_server.daemon` puts the parts together; :mod:`~fedpeft_server.strategy` is the round loop;
:mod:`~fedpeft_server.coordinator`, :mod:`~fedpeft_server.agents` and :mod:`~fedpeft_server.exchange` are the services;
:mod:`~fedpeft_server.engine` is the only importer of Flower's private names and :mod:`~fedpeft_server.pki` the authority.
"""
