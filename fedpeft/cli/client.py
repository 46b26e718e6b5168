"""``fedpeft client``."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

from fedpeft.cli.logs import configure, quiet_flower
from fedpeft.errors import FedPeftError


def print_config() -> None:
    from fedpeft_client.config import TEMPLATE

    print(TEMPLATE, end="")


def up(bundle_path: Path, config_path: Path | None, data: str | None, as_json: bool) -> None:
    from fedpeft.bundle import load_bundle
    from fedpeft_client.config import load_client_config

    bundle = load_bundle(bundle_path)
    if bundle.role != "client":
        raise FedPeftError(
            f"belongs to an {bundle.role}",
            field=str(bundle_path),
            hint="an agent needs a bundle made by `server enroll`",
        )
    config = load_client_config(config_path or bundle_path.parent / "client.toml", bundle.name, data)
    log = configure(as_json).bind(client=bundle.name)
    from fedpeft_client.agent import Agent
    from fedpeft_client.bundle import open_channel
    from fedpeft_client.engine import FleetSession

    quiet_flower()

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    _check_data(config.data)
    channel, endpoint = open_channel(bundle)
    agent = Agent(bundle, config, channel)

    def on_state(state: str) -> None:
        log.info(state, server=endpoint)
        if state == "online":
            threading.Thread(target=agent.announce, daemon=True).start()

    try:
        FleetSession(channel, bundle, endpoint).run(agent.app(), stop, on_state)
    finally:
        channel.close()


def _check_data(spec: str) -> None:
    """A missing data folder is found at the start, not in the first round."""
    if not spec.startswith("builtin:") and not Path(spec).exists():
        raise FedPeftError(
            "no such folder", field="client.toml: data", value=spec, hint="correct the path in client.toml"
        )
