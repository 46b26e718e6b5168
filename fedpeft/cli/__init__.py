"""The ``fedpeft`` command: a thin shell over the library, the simulator, the daemon and the agent.

Every command imports what it needs when it runs, so that ``fedpeft --help`` answers at once. Results go to standard
output, progress and errors to standard error. Exit codes: 0 done, 1 the work failed, 2 something given was wrong,
130 interrupted.
"""

from __future__ import annotations

import sys
import warnings


def main() -> None:
    """Entry point of the console script."""
    from fedpeft.cli.app import app
    from fedpeft.errors import FedPeftError

    # Deprecations between transformers and PEFT are for their maintainers, not for a user's terminal.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    try:
        app(standalone_mode=True)
    except FedPeftError as error:
        # A message may quote a parser or a server that used several lines.
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
