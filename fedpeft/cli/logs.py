"""Logging of the long-running commands: structured, on standard error."""

from __future__ import annotations

import logging
import sys
from typing import Any


def configure(as_json: bool) -> Any:
    """Set up structlog for our own and the standard library's loggers; returns the root logger."""
    import structlog

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    for name in ("fedpeft", "fedpeft_server", "fedpeft_client"):
        logging.getLogger(name).setLevel(logging.INFO)
    return structlog.get_logger("fedpeft")


def quiet_flower() -> None:
    """Call it after Flower's import, which adds a handler of its own: every line would appear twice.

    Flower also calls the late reply of a client that missed a deadline an error, which it is not.
    """
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.propagate = True
    flower.addFilter(lambda record: not record.getMessage().startswith("Failed to store Message reply"))
